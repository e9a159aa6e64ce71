"""Base models: a Hub id, a local transformers folder, a GGUF file, or the embedded SmolLM2-135M.

``load_base(name)`` is the one door. It returns a :class:`BaseModel`: the model in evaluation mode, its tokenizer
with a padding token, and a content hash that adapters remember.
"""

from leantune.models.base import BaseModel, load_base, load_tokenizer
from leantune.models.content import content_hash
from leantune.models.embedded import EMBEDDED_NOTE
from leantune.models.fact import bare_model, facts
from leantune.models.quantisation import Quantisation

__all__ = [
    "EMBEDDED_NOTE",
    "BaseModel",
    "Quantisation",
    "bare_model",
    "content_hash",
    "facts",
    "load_base",
    "load_tokenizer",
]
