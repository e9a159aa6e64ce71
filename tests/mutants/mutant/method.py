"""Faults in what an adapter computes, merges and copies."""

from __future__ import annotations

from harness import Fault

KERNEL = "leantune/kernels/partial_linear.py"
BASE = "leantune/methods/_base.py"
S2FT = "leantune/methods/s2ft.py"
SLICE = "leantune/methods/_slice.py"

KERNEL_TESTS = "tests/kernels/test_partial_linear.py"
S2FT_TESTS = "tests/methods/test_s2ft.py"
PACKED_TESTS = "tests/methods/test_packed_base.py"
CONTRACT = "tests/methods/test_contract.py"

KERNEL_FAULTS = (
    Fault(
        "a view of the activation is saved",
        KERNEL,
        "return x[..., entries].clone(memory_format=torch.contiguous_format)",
        "return x[..., entries]",
        "the whole activation stays alive until the backward: the memory that S2FT saves is lost",
        (KERNEL_TESTS,),
    ),
    Fault(
        "the slice's share of the input gradient has the wrong sign",
        KERNEL,
        "_add_at(flat, index, seen @ delta)",
        "_add_at(flat, index, -(seen @ delta))",
        "every layer below trains on a wrong gradient once the slice has left zero",
        (
            f"{KERNEL_TESTS}::test_gradcheck",
            f"{S2FT_TESTS}::test_gradients_of_a_started_slice_are_those_of_the_merged_model",
        ),
    ),
    Fault(
        "the input gradient leaves the slice out",
        KERNEL,
        "                add_product(flat, seen, delta)\n",
        "                pass\n",
        "row slices (q, k, v, up, gate) pass on the gradient of the base alone",
        (f"{KERNEL_TESTS}::test_gradcheck",),
    ),
    Fault(
        "all outputs reach the gradient of a row slice",
        KERNEL,
        'seen = pick(grad_rows, index) if ctx.axis == "out" else grad_rows',
        'seen = grad_rows[:, : delta.shape[0]] if ctx.axis == "out" else grad_rows',
        "rows train on the gradient of other rows: right shape, wrong numbers",
        (f"{KERNEL_TESTS}::test_gradient_is_the_slice_of_the_dense_gradient",),
    ),
    Fault(
        "the slice's product in 16 bits",
        KERNEL,
        "add_product(rows, kept.to(delta.dtype), delta.t())",
        "add_product(rows, kept, delta.t().to(kept.dtype))",
        "over a bfloat16 base small updates of the slice are rounded away in the forward",
        (f"{KERNEL_TESTS}::test_a_slice_finer_than_16_bits_is_seen_in_the_output",),
    ),
)

LAYER_FAULTS = (
    Fault(
        "wrong axis",
        S2FT,
        'return own.weight.detach(), 1 if own.axis == "in" else 0, where',
        'return own.weight.detach(), 0 if own.axis == "in" else 1, where',
        "merging writes columns over rows",
        (f"{S2FT_TESTS}::test_forward_and_merge",),
    ),
    Fault(
        "indices are not saved",
        SLICE,
        'self.register_buffer("index", chosen.index.to(device, copy=True))',
        'self.register_buffer("index", chosen.index.to(device, copy=True), persistent=False)',
        "a file loads onto whatever another version of the random generator draws",
        (f"{S2FT_TESTS}::test_the_file_wins_over_what_the_config_would_choose",),
    ),
    Fault(
        "one-hot factor in another order",
        S2FT,
        "one_hot[torch.arange(own.index.numel(), device=delta.device), own.index] = 1",
        "one_hot[torch.arange(own.index.numel(), device=delta.device), own.index.flip(0)] = 1",
        "the exported LoRA gives each slice to another channel",
        ("tests/adapters/test_lora_conversion.py::test_the_file_holds_the_change_of_every_weight",),
    ),
    Fault(
        "factors of a row slice transposed",
        S2FT,
        "else (one_hot.t().contiguous(), delta)",
        "else (delta.t().contiguous(), one_hot)",
        "the exported LoRA of q, k, v, up and gate is the transposed change",
        (CONTRACT,),
        "s2ft-all-linear-llama and lora_form_equals_the_delta",
    ),
    Fault(
        "the slice in the base's dtype",
        BASE,
        "return torch.float64 if self.weight.dtype == torch.float64 else torch.float32",
        "return self.weight.dtype",
        "over a bfloat16 base the trained slice has 8 bits: updates below 1/256 are lost",
        ("tests/hosts/test_peft_host.py::test_slices_are_float32_over_16_bits_whoever_injects_them",),
    ),
    Fault(
        "unmerge by subtraction",
        BASE,
        "write_region(self._oriented_weight(), dim, index, cast(Tensor, getattr(self, kept)))",
        "weight, delta = self._oriented_weight(), self.delta_region(self.merged_adapters[-1])[0]\n"
        "                left = read_region(weight, dim, index).to(delta.dtype) - delta\n"
        "                write_region(weight, dim, index, left.to(weight.dtype))",
        "the base drifts by a rounding with every merge and unmerge; in bfloat16 39% of the entries change at once",
        (CONTRACT,),
        "s2ft-toy-llama and (unmerge_restores or unmerge_does_not_drift)",
    ),
    Fault(
        "stale write-back",
        BASE,
        "kept, dim, index = self._overwritten.pop()",
        "kept, dim, index = self._overwritten.pop(0)",
        "with two adapters merged, unmerging writes the first one back into the base for good",
        (CONTRACT,),
        "s2ft and llama and unmerge_restores_the_base",
    ),
    Fault(
        "merged weights rounded twice",
        BASE,
        "updated = (original.to(delta.dtype) + delta).to(weight.dtype)",
        "updated = original + delta.to(weight.dtype)",
        "merging into a bfloat16 base rounds the delta before it is added",
        (f"{S2FT_TESTS}::test_merged_weights_are_rounded_once",),
    ),
    Fault(
        "the base trains along",
        BASE,
        "            super().inject_adapter(model, adapter_name, *args, **kwargs)\n",
        "            super().inject_adapter(model, adapter_name, *args, **kwargs)\n"
        "            model.requires_grad_(True)\n",
        "the whole base gets gradients, moments and changed weights that no adapter file holds",
        (f"{CONTRACT}::test_contract[s2ft-toy-llama-training_touches_what_trains_alone]",),
    ),
    Fault(
        "every row of a mixed batch gets every adapter",
        BASE,
        "for row, own in enumerate(names) if own == name]",
        "for row, own in enumerate(names) if own != BASE_ROW]",
        "one user's request is answered with another user's adapter",
        (CONTRACT,),
        "s2ft-toy-llama and mixed_batch",
    ),
    Fault(
        "a disabled adapter still acts",
        BASE,
        "        if self.disable_adapters:\n            if self.merged:\n                self.unmerge()\n"
        "            return self.base_layer(x, *args, **kwargs)\n",
        "        if self.disable_adapters and self.merged:\n            self.unmerge()\n",
        "the reference of DPO, and every comparison with the base, is the tuned model itself",
        (CONTRACT,),
        "s2ft-toy-llama and reference_forward_in_between",
    ),
)

PACKED_FAULTS = (
    Fault(
        "what a host cast to 16 bits stays in 16 bits",
        BASE,
        "packed_weight.widen(getattr(self, container)[name])",
        "getattr(self, container)[name].requires_grad_()",
        "over a 4-bit base TRL and PEFT cast the slice to bfloat16: updates below 1/256 are lost",
        (f"{PACKED_TESTS}::test_what_a_host_cast_to_16_bits_trains_in_float32_again",),
    ),
    Fault(
        "unmerging packs a weight once more",
        BASE,
        "                    packed_weight.put_back(self.get_base_layer(), kept)\n",
        "                    delta = self.get_delta_weight(self.merged_adapters[len(self._overwritten)])\n"
        "                    self.set_base_weight(self.get_base_weight() - delta)\n",
        "a 4-bit base is rounded anew with every merge and unmerge, and its hash is that of no file",
        (f"{PACKED_TESTS}::test_merging_is_undone_bit_for_bit_with_all_that_stands_on_the_parameter",),
    ),
    Fault(
        "the hash leaves the scales out",
        "leantune/models/content.py",
        "        yield from packed_weight.parts(module, prefix)\n",
        "        yield next(packed_weight.parts(module, prefix))\n",
        "an adapter loads over a 4-bit base of twice the weights",
        ("tests/models/test_quantisation.py::test_the_hash_is_of_bits_and_scales_and_survives_use",),
    ),
)

REFERENCE_FAULTS = (
    Fault(
        "a reference draws entries of its own",
        S2FT,
        "        if template is not None and template in self.s2ft_slice:\n",
        "        if template is not None and self.waits_for_data(template):\n",
        "DPO's reference of a loaded adapter puts the trained numbers at other channels",
        ("tests/hosts/test_trl_host.py::test_the_reference_of_a_file_with_its_own_choice[dpo]",),
    ),
    Fault(
        "adapters with one choice share its buffer",
        "leantune/methods/_expert.py",
        'self.register_buffer("index", channels.clone())',
        'self.register_buffer("index", channels)',
        "loading a file into one adapter moves the slices of its reference to other channels",
        ("tests/methods/test_expert.py::test_copies",),
    ),
)
