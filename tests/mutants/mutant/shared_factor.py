"""Faults in Multi-LoRA: the grouped kernel, the shared A, its starts, and the tasks of a batch's rows."""

from __future__ import annotations

from harness import Fault

KERNEL = "leantune/kernels/grouped_linear.py"
ACCUMULATION = "leantune/kernels/accumulation.py"
METHOD = "leantune/methods/multi_lora.py"
ADAPTER = "leantune/methods/_shared_adapter.py"
PROJECTION = "leantune/methods/_shared_projection.py"
ROWS = "leantune/methods/_row_task.py"

KERNEL_TESTS = "tests/kernels/test_grouped_linear.py"
METHOD_TESTS = "tests/methods/test_multi_lora.py"
START_TESTS = "tests/methods/test_multi_lora_start.py"
FILE_TESTS = "tests/methods/test_multi_lora_file.py"

SHARED_FACTOR_FAULTS = (
    Fault(
        "an absent task gets zeros for a gradient",
        KERNEL,
        "asks and size > 0 for asks",
        "asks and size >= 0 for asks",
        "AdamW moves the B of tasks that are not in the batch, by momentum and weight decay",
        (KERNEL_TESTS,),
    ),
    Fault(
        "rows are not sorted before the products",
        KERNEL,
        "return _flat(x if order is None else x.index_select(0, order))",
        "return _flat(x if order is None else x[: len(order)])",
        "a row of a mixed batch takes the B of another row's task",
        (KERNEL_TESTS,),
    ),
    Fault(
        "the input is kept although A is frozen",
        KERNEL,
        "ctx.keeps_input = ctx.needs_input_grad[3]",
        "ctx.keeps_input = True",
        "the activation of every adapted layer stays alive until the backward",
        (KERNEL_TESTS,),
    ),
    Fault(
        "the scaling is left out of the gradient of B",
        KERNEL,
        "(seen[part].t() @ z[part]) * scale if wants else None",
        "(seen[part].t() @ z[part]) if wants else None",
        "alpha no longer scales what the optimizer sees, and SGD takes steps of another length",
        (KERNEL_TESTS,),
    ),
    Fault(
        "the scaling is left out of the gradient of the input",
        KERNEL,
        "torch.mm(seen[part], factor * scale, out=grad_z[part])",
        "torch.mm(seen[part], factor, out=grad_z[part])",
        "every layer below trains on a wrong gradient once B has left zero",
        (KERNEL_TESTS,),
    ),
    Fault(
        "gradients of z are scattered to the first rows",
        KERNEL,
        "scattered.index_copy_(0, groups.order, grad_z",
        "scattered.index_copy_(0, groups.order.sort().values, grad_z",
        "a row passes down the gradient of another task's row",
        (KERNEL_TESTS,),
    ),
    Fault(
        "the share is rounded before it is added",
        ACCUMULATION,
        "        flat.add_(a @ b, alpha=scale)",
        "        flat.add_((a @ b).to(flat.dtype), alpha=scale)",
        "over a 16-bit base small updates are lost in the forward",
        (KERNEL_TESTS,),
    ),
    Fault(
        "each task draws an A of its own",
        ADAPTER,
        "        if self.multi_lora_shared is not None:\n            return\n        rank, device",
        "        rank, device",
        "the tasks that are there compute with another A than they were trained with",
        (METHOD_TESTS, FILE_TESTS),
    ),
    Fault(
        "A goes with the first task that goes",
        ADAPTER,
        "if not self.multi_lora_B:",
        "if self.multi_lora_B:",
        "deleting one task breaks the others",
        (METHOD_TESTS,),
    ),
    Fault(
        "A trains although no task does",
        ADAPTER,
        "any(each.requires_grad for each in self.multi_lora_B.parameters())",
        "True",
        "a frozen adapter that was loaded for inference still trains its A",
        (METHOD_TESTS,),
    ),
    Fault(
        "a file's other A is taken without a word",
        PROJECTION,
        "if isinstance(stored, Tensor) and not shared.waits and not _same(shared.weight, stored):",
        "if isinstance(stored, Tensor) and shared.waits and not _same(shared.weight, stored):",
        "loading one task changes what all others compute",
        (FILE_TESTS,),
    ),
    Fault(
        "every layer draws the same numbers",
        PROJECTION,
        'seeded("shared projection", seed, path)',
        'seeded("shared projection", seed)',
        "layers of one shape share their row space",
        (START_TESTS,),
    ),
    Fault(
        "orthonormal rows of length one",
        PROJECTION,
        ".t().contiguous() / scaling",
        ".t().contiguous()",
        "the preconditioner is not the identity: the step depends on alpha again",
        (START_TESTS,),
    ),
    Fault(
        "the least principal directions",
        PROJECTION,
        "rows = torch.linalg.eigh(moment).eigenvectors[:, -rank:].flip(1).t()",
        "rows = torch.linalg.eigh(moment).eigenvectors[:, :rank].flip(1).t()",
        "A sees the directions in which the inputs hardly vary",
        (START_TESTS,),
    ),
    Fault(
        "padding counts as data of the start",
        PROJECTION,
        "values = kept(module, args[0])",
        "values = args[0].detach().flatten(0, -2)",
        "principal directions of padding tokens",
        (START_TESTS,),
    ),
    Fault(
        "dropout is keyed without the task",
        ROWS,
        'seeded("dropout", key, task, self.step)',
        'seeded("dropout", key, len(own), self.step)',
        "two tasks with as many rows in the batch lose the same inputs",
        (METHOD_TESTS,),
    ),
    Fault(
        "dropout takes positions last",
        ROWS,
        "shape = (*x.shape[1:-1], len(own), x.shape[-1])\n"
        '        source = None if self.step is None else seeded("dropout", key, task, self.step)\n'
        "        kept = torch.rand(shape, generator=source).movedim(-2, 0)",
        "shape = (len(own), *x.shape[1:])\n"
        '        source = None if self.step is None else seeded("dropout", key, task, self.step)\n'
        "        kept = torch.rand(shape, generator=source)",
        "a longer neighbour in the batch changes which inputs a task loses",
        (METHOD_TESTS,),
    ),
    Fault(
        "the rows' tasks are forgotten after one forward",
        METHOD,
        '            kwargs.setdefault("adapter_names", self.row_tasks)\n',
        '            kwargs.setdefault("adapter_names", self.row_tasks)\n            self.row_tasks = None\n',
        "a checkpointed layer is recomputed with the active adapter: wrong gradients",
        (METHOD_TESTS,),
    ),
    Fault(
        "a layer takes every task's scaling from the first",
        METHOD,
        "[self.scaling[task] for task in tasks]",
        "[self.scaling[tasks[0]] for task in tasks]",
        "a task with another alpha computes something else in a mixed batch than alone",
        (METHOD_TESTS,),
    ),
)
