"""FastSIU: make a vision-language model forget how one concept looks, from one image.

Names load on first use, so `import fastsiu` is instant and the fused loss needs neither transformers nor peft.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "fused_dmk_ce": "loss",
    "DMKCELoss": "loss",
    "why_not": "loss",
    "TeacherCache": "teacher",
    "no_logits": "rows",
    "supervised_rows": "rows",
    "RowIndex": "rows",
    "head_of": "rows",
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
