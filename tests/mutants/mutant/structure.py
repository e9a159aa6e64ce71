"""Faults in which rows and columns belong together: tables, the tracer, experts, convolutions."""

from __future__ import annotations

from harness import Fault

STRUCTURE = "leantune/methods/structure.py"
EXPERT = "leantune/methods/_expert.py"

TRACER_TESTS = "tests/methods/test_tracer.py"
EXPERT_TESTS = "tests/methods/test_expert.py"
UNKNOWN_TESTS = "tests/methods/test_unknown_models.py"

STRUCTURE_FAULTS = (
    Fault(
        "the up half of a fused layer begins too early",
        STRUCTURE,
        'Part(path, "up", "out", out // 2, 1, half * (out // 2), width_in)',
        'Part(path, "up", "out", out // 2, 1, half * (out // 4), width_in)',
        "in Phi-3 the gate of one channel trains with the up projection of another",
        (f"{TRACER_TESTS}::test_the_trace_finds_what_the_table_says[phi3]",),
    ),
    Fault(
        "heads of a fused layer taken for blocks of query, key and value",
        STRUCTURE,
        "parts = [part(name, layout.heads, number * d, 3 * d) for number, name in enumerate(names)]",
        "parts = [part(name, layout.heads, number * layout.heads * d) for number, name in enumerate(names)]",
        "in GPT-NeoX the query rows of a head are keys and values of others",
        (f"{TRACER_TESTS}::test_the_trace_finds_what_the_table_says[neox]",),
    ),
    Fault(
        "query heads of a group taken in steps",
        STRUCTURE,
        "unit = (chosen[:, None] * each + torch.arange(each)).flatten()",
        "unit = (chosen[:, None] + torch.arange(each) * things).flatten()",
        "with grouped-query attention a key/value head trains beside query heads of other groups",
        ("tests/methods/test_selection.py::test_entries_of_heads_and_groups",),
    ),
    Fault(
        "a block that looks alike is taken unchecked",
        "leantune/methods/_tracer.py",
        "if renamed is None or not _holds(between, renamed):",
        "if renamed is None:",
        "one odd block among many trains rows that its own activation never meets",
        (f"{TRACER_TESTS}::test_a_block_that_looks_alike_is_checked",),
    ),
    Fault(
        "a way around to the output is overlooked",
        "leantune/methods/_cut_graph.py",
        "            elsewhere = to_result\n",
        "            elsewhere = 0\n",
        "layers that feed the residual stream too count as coupled",
        (f"{TRACER_TESTS}::test_the_degree_rule",),
    ),
)

EXPERT_FAULTS = (
    Fault(
        "the router trains along",
        "leantune/methods/_base.py",
        "            super().inject_adapter(model, adapter_name, *args, **kwargs)\n",
        "            super().inject_adapter(model, adapter_name, *args, **kwargs)\n"
        "            for name, each in model.named_parameters():\n"
        "                each.requires_grad_(each.requires_grad or 'mlp.gate.weight' in name)\n",
        "tokens go to other experts, and no adapter file holds the router that sends them",
        (f"{EXPERT_TESTS}::test_training_touches_the_slices_alone",),
    ),
    Fault(
        "each expert takes the delta of the one before",
        EXPERT,
        "pieces.setdefault(name, []).append((each.index[expert], delta[expert]))",
        "pieces.setdefault(name, []).append((each.index[expert], delta[expert - 1]))",
        "training runs well and the merged model is another one",
        (f"{EXPERT_TESTS}::test_outputs_and_gradients_are_those_of_dense_weights[mixtral-down]",),
    ),
    Fault(
        "gate and up rows of experts in the other layout",
        EXPERT,
        "        if self.interleaved:\n            return torch.stack",
        "        if not self.interleaved:\n            return torch.stack",
        "a channel's slice is the gate of one channel and of its neighbour",
        (f"{EXPERT_TESTS}::test_outputs_and_gradients_are_those_of_dense_weights[mixtral-up]",),
    ),
)

CONVOLUTION_FAULTS = (
    Fault(
        "kernels lie on their side",
        "leantune/methods/_convolution.py",
        "return delta.view(len(delta), -1, *self._convolution.weight.shape[2:])",
        "return delta.view(len(delta), -1, *self._convolution.weight.shape[2:]).transpose(-1, -2)",
        "rows and columns of a picture are exchanged in the trained part, and in the exported LoRA they are not",
        (f"{UNKNOWN_TESTS}::test_as_plain_lora[camera]",),
    ),
    Fault(
        "input channels of a convolution in another order",
        "leantune/methods/_convolution.py",
        "return columns[::places] // places",
        "return (columns[::places] // places).flip(0)",
        "the exported LoRA gives the kernels of each channel to another one",
        (f"{UNKNOWN_TESTS}::test_as_plain_lora[camera]",),
    ),
)
