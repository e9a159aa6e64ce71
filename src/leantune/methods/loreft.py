r"""LoReFT: a trained edit of hidden states at a few positions of the prompt; no weight changes.

    h' = h + R^T (W h + b - R h)         R (r, d) with orthonormal rows, W (r, d), b (r)

at the first and the last ``n`` tokens of the prompt (``f7+l7``), in the output of every block. In generation the
prompt is edited as it is read; tokens that are generated are left alone, and see the edit through the cache.

Source: ReFT, Wu et al., arXiv 2404.03592, eq. 2 and section 3.3; rank 8, positions f7+l7, all blocks and one edit for
first and last positions are 0.03% of LLaMA-7B, as in their table and S2FT's. The orthonormal rows are those of a QR
decomposition of a free matrix, its signs fixed by a positive diagonal: the free matrix trains and is what a file
holds, so that any optimizer serves, and loading it gives the same R.

Where we deviate: ``W`` starts equal to ``R`` with ``b = 0``, so that a fresh adapter changes nothing
(``init_weights=False`` is the authors' start: W at random). On prompts shorter than first + last a position that is
both counts once, as a last one; theirs halves both counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from peft import get_peft_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from leantune.core import prompt
from leantune.core.errors import ConfigError, MethodError, TargetError, describe
from leantune.methods._base import AdapterConfig, AdapterLayer, AdapterModel, is_adaptable
from leantune.methods._block import block_of
from leantune.methods._hidden_edit import CANNOT_MERGE, LoReFTBlock, LoReFTLinear
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._position import detach, listen, parse, positions_on, stack_of
from leantune.methods._registry import Method, register

# PEFT warns of an adapter whose name is in the prefix, and TRL calls its reference "ref".
_PEFT_NAME = "lore_ft"


@dataclass
class LoReFTConfig(AdapterConfig):
    """Options of LoReFT.

    Raises:
        ConfigError: a rank below one, or positions that cannot be read.
    """

    r: int = field(default=8, metadata={"help": "Rank of the edit; where hidden states are narrower, their width."})
    positions: str = field(
        default="f7+l7",
        metadata={"help": "How many of the first and last tokens of the prompt are edited, as f7+l7, f3 or l1."},
    )
    share_weights: bool = field(
        default=True, metadata={"help": "One edit for first and last positions; False trains one for each."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(_PEFT_NAME)
        if self.r < 1:
            raise ConfigError(describe("LoReFTConfig.r", repr(self.r), "a rank from 1", "try 8"))
        parse(self.positions)


class LoReFTModel(AdapterModel):
    """Finds the blocks, edits what they return, and tells them where the prompts of a batch are."""

    prefix = prefix_of(_PEFT_NAME)
    tuner_layer_cls = LoReFTLinear

    def _blocks(self) -> dict[str, nn.Module]:
        """The blocks of the model by path."""
        found: dict[str, nn.Module] = {}
        for path, module in self.model.named_modules():
            block = block_of(path)
            if block != path and is_adaptable(module):
                target = self.model.get_submodule(block)
                found[block] = target.get_base_layer() if isinstance(target, AdapterLayer) else target
        return {path: module for path, module in found.items() if not is_adaptable(module)}

    def _decoder_modules(self) -> set[nn.Module]:
        model = cast(Any, self.model)
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return set()
        return set(model.modules()) - set(model.get_encoder().modules())

    def adaptable(self, module: nn.Module) -> bool:
        """Blocks, and linear layers."""
        return super().adaptable(module) or any(module is block for block in self._blocks().values())

    def layer_class(self, base: nn.Module) -> type[AdapterLayer]:
        """The layer for a block, or that for a linear one."""
        return LoReFTLinear if is_adaptable(base) else LoReFTBlock

    def layer_options(self, config: Any, path: str) -> dict[str, Any] | None:
        """Where the positions of the module at ``path`` are told.

        Raises:
            TargetError: it is in a decoder beside an encoder, which reads no prompt.
        """
        del config
        if self.model.get_submodule(path) in self._decoder_modules():
            got = "in a decoder beside an encoder, which reads no prompt"
            raise TargetError(describe(path, got, "a block of the encoder", "leave target_modules out"))
        if self._predicts_text():
            listen(self.model)
        stack = stack_of(self.model, path)
        return {"positions": None if stack is None else positions_on(stack, attach=True)}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            chosen = peft_config.layers_to_transform
            numbers = {chosen} if isinstance(chosen, int) else None if chosen is None else set(chosen)
            # Beside a decoder, the encoder's.
            found = [path for path, block in self._blocks().items() if block not in self._decoder_modules()]
            blocks = {path for path in found if numbers is None or int(path.rpartition(".")[2]) in numbers}
            if found and not blocks:
                got = f"layers_to_transform={chosen!r}"
                do = "count from 0, or leave it out"
                raise TargetError(describe("target_modules", got, f"numbers among the {len(found)} blocks", do))
            if blocks:
                # Whole paths: a number alone names many a module.
                peft_config.target_modules = blocks
        return super()._prepare_adapter_config(peft_config, model_config)

    def default_targets(self) -> tuple[str, ...]:
        """Nothing beyond the blocks."""
        return ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; the labels of a causal language model tell where its prompts end."""
        labels = kwargs.get("labels")
        is_text = isinstance(labels, Tensor) and labels.dim() == 2 and self._predicts_text()
        with prompt.told_by(labels if is_text else None):
            # PEFT calls the model's forward, past the hooks of the model itself.
            positions = positions_on(self.model)
            if positions is not None:
                positions(self.model, args, kwargs)
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, of a ``PeftModelForCausalLM``.

        Raises:
            MethodError: the prompt would not be read in one go, or be read again together with the answer.
        """
        settings = {**vars(kwargs.get("generation_config") or self.model.generation_config), **kwargs}
        has_chunks = settings.get("prefill_chunk_size") is not None
        if has_chunks or settings.get("use_cache") is False:
            got = "generation in chunks of the prompt" if has_chunks else "generation without a cache"
            wanted = "a cache that the whole prompt is read into at once, by which it is told from the answer"
            raise MethodError(describe("LoReFT", got, wanted, "leave prefill_chunk_size and use_cache out"))
        return self.model.generate(*args, **kwargs)

    def _predicts_text(self) -> bool:
        tasks = {str(getattr(each.task_type, "value", each.task_type)) for each in self.peft_config.values()}
        return "CAUSAL_LM" in tasks or type(self.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, LoReFTBlock) or isinstance(new_module, LoReFTBlock):
            # PEFT's would look for the one weight of a layer.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        edited = [cast(LoReFTLinear, layer) for layer in self._layers()]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in edited:
            layer.release()
        detach(model)
        return model


def _trainable_parameters(config: LoReFTConfig, out_features: int, in_features: int) -> int:
    del in_features
    rank = min(config.r, out_features)
    return (1 if config.share_weights else 2) * rank * (2 * out_features + 1)


def _apply(model: nn.Module, config: LoReFTConfig) -> nn.Module:
    return get_peft_model(model, config)


register_with_peft(_PEFT_NAME, LoReFTConfig, LoReFTModel)
register(
    Method(
        name="loreft",
        title="Low-rank linear subspace ReFT",
        config=LoReFTConfig,
        formula="h + R^T (W h + b - R h)",
        paper="ReFT, arXiv 2404.03592",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        mergeable=False,
        lora_form=False,
        cannot_merge=CANNOT_MERGE,
        default_learning_rate=1e-3,
        toy_options={"r": 2, "positions": "f2+l2"},
    )
)
