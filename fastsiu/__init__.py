"""FastSIU: make a vision-language model forget how one concept looks, from one image.

Names load on first use, so `import fastsiu` is instant and the fused loss needs neither
transformers nor peft.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "fused_dmk_ce": "loss.fused",
    "DMKCELoss": "loss.fused",
    "why_not": "loss.fused",
    "TeacherCache": "loss.teacher",
    "no_logits": "loss.rows",
    "supervised_rows": "loss.rows",
    "RowIndex": "loss.rows",
    "head_of": "loss.rows",
    "unlearn": "driver",
    "Result": "driver",
    "Request": "request",
    "Recipe": "request",
    "BadInput": "request",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastsiu' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
