"""FastSIU: make a vision-language model forget how one concept looks, from one image.

Names load on first use, so `import fastsiu` is instant and the fused loss needs neither
transformers nor peft.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what a type checker reads; at run time `__getattr__` loads the same names
    from .driver import Result as Result
    from .facade import unlearn as unlearn
    from .loss.backend import why_not as why_not
    from .loss.fused import DMKCELoss as DMKCELoss
    from .loss.fused import fused_dmk_ce as fused_dmk_ce
    from .loss.model_head import head_of as head_of
    from .loss.rows import RowIndex as RowIndex
    from .loss.rows import no_logits as no_logits
    from .loss.rows import supervised_rows as supervised_rows
    from .loss.teacher import TeacherCache as TeacherCache
    from .request import BadInput as BadInput
    from .request import Recipe as Recipe
    from .request import Request as Request
    from .settings import ModelRef as ModelRef
    from .settings import RecipeChoice as RecipeChoice
    from .settings import ReportOptions as ReportOptions
    from .settings import Settings as Settings

_PUBLIC = {
    "fused_dmk_ce": "loss.fused",
    "DMKCELoss": "loss.fused",
    "why_not": "loss.backend",
    "TeacherCache": "loss.teacher",
    "no_logits": "loss.rows",
    "supervised_rows": "loss.rows",
    "RowIndex": "loss.rows",
    "head_of": "loss.model_head",
    "unlearn": "facade",
    "Result": "driver",
    "Request": "request",
    "Recipe": "request",
    "BadInput": "request",
    "ModelRef": "settings",
    "RecipeChoice": "settings",
    "Settings": "settings",
    "ReportOptions": "settings",
}
__all__ = ["__version__", *_PUBLIC]


if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'fastsiu' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
