"""The embedded fictional world: drawn creatures, questions about them and a tiny LLaVA that knows
them.

Everything FastSIU demonstrates or measures without a network runs on this world. `MODEL_DIR` is the
shipped model, a plain Hugging Face directory.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
