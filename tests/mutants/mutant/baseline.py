"""Faults in the baselines: starts away from zero, LISA's draw, GaLore's subspace, prompts."""

from __future__ import annotations

from harness import Fault

OFFSET = "leantune/methods/_offset.py"
LISA = "leantune/methods/lisa.py"
PROJECTION = "leantune/methods/_projection.py"
BASELINE_TESTS = "tests/methods/test_baselines.py"
LISA_TESTS = "tests/methods/test_lisa.py"
GALORE_TESTS = "tests/methods/test_galore.py"

BASELINE_FAULTS = (
    Fault(
        "the start is added and not taken out",
        OFFSET,
        "value if self.dim == 0 else -value",
        "value",
        "PiSSA begins at W plus twice its leading part",
        (BASELINE_TESTS,),
        "neither_function_nor_base",
    ),
    Fault(
        "the rank doubles and the scaling halves",
        OFFSET,
        "factor = 2**0.5 if config.use_rslora else 2",
        "factor = 1",
        "the saved adapter acts at half its strength",
        (BASELINE_TESTS,),
        "plain_lora_of_twice_the_rank",
    ),
    Fault(
        "a reference model starts anew",
        OFFSET,
        "        if twin is not None:\n",
        "        if twin is not None and not waits:\n",
        "DPO compares with a model that was never trained",
        ("tests/methods/test_contract.py",),
        "reference_copy and lora-ga and llama",
    ),
    Fault(
        "moments of resting blocks are kept",
        LISA,
        "                state.pop(parameter, None)\n",
        "                pass\n",
        "memory grows until it is that of full fine-tuning",
        (LISA_TESTS,),
        "memory_stays",
    ),
    Fault(
        "the optimizer holds the first draw alone",
        LISA,
        "parameters = [each for each in model.parameters() if self.config.embeddings or id(each) in inside]",
        "parameters = [each for each in model.parameters() if each.requires_grad]",
        "blocks that are drawn later never train",
        (LISA_TESTS,),
        "memory_stays",
    ),
    Fault(
        "the larger side is projected",
        PROJECTION,
        'return {"std": rows >= columns,',
        'return {"std": rows < columns,',
        "GaLore remembers more than it must",
        (GALORE_TESTS,),
        "smaller_side or remembers",
    ),
    Fault(
        "a new subspace in every step",
        PROJECTION,
        'if int(state["step"]) % group["update_proj_gap"] == 0:',
        'if int(state["step"]) % 1 == 0:',
        "an SVD a step, and moments that belong to no subspace",
        (GALORE_TESTS,),
        "formula",
    ),
    Fault(
        "the step of a projected weight is not scaled",
        PROJECTION,
        '.mul_(group["scale"])',
        "",
        "projected matrices learn at four times the rate",
        (GALORE_TESTS,),
        "formula",
    ),
    Fault(
        "moments come back in the weight's 16 bits",
        PROJECTION,
        "                self.state[parameter][name] = value.to(device).clone()\n",
        "                self.state[parameter][name] = value.to(device, parameter.dtype).clone()\n",
        "a resumed run forgets most of what its optimizer knew",
        (GALORE_TESTS,),
        "every_bit",
    ),
    Fault(
        "a prefix of noise",
        "leantune/methods/prefix.py",
        "if config.init_weights is None and not config.prefix_projection:",
        "if config.prefix_projection:",
        "training begins far above the loss of the base and does not come back in a short run",
        (BASELINE_TESTS,),
        "starts_as_a_text",
    ),
    Fault(
        "a prompt is put in front again and again",
        "leantune/evaluate/generation.py",
        "self.stretch = max_new_tokens if is_prompted else _STRETCH_TOKENS",
        "self.stretch = _STRETCH_TOKENS",
        "long answers of prefix tuning fail",
        ("tests/train/test_baseline_run.py",),
        "answers and prefix",
    ),
)
