"""The fused loss and the cached teacher, for any trainer: neither transformers nor peft is
imported."""

try:
    from .fused import DMKCELoss as DMKCELoss
    from .fused import fused_dmk_ce as fused_dmk_ce
    from .fused import why_not as why_not
    from .teacher import TeacherCache as TeacherCache
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("fastsiu.kernels"):
        raise
    raise ImportError(  # a checkout whose git makes no symbolic links
        "fastsiu/kernels is no link to the folder kernels/: run `git config core.symlinks true` "
        "and `git checkout -- fastsiu/kernels`, or install a copy with `pip install .`."
    ) from None
