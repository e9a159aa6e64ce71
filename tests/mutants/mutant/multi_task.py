"""Faults in runs of several tasks: each would let one task change how another trains."""

from __future__ import annotations

from harness import Fault

OPTIMIZER = "leantune/train/task_optimizer.py"
TRAINER = "leantune/train/task_trainer.py"
HEAD = "leantune/train/task_head.py"
SAMPLER = "leantune/train/task_sampler.py"
SETUP = "leantune/train/task_setup.py"

PROOF = "tests/train/test_multi_task_proof.py::test_training_together_is_training_alone"
RUNS = "tests/train/test_multi_task.py"

TASK_FAULTS = (
    Fault(
        "one gradient norm for all tasks",
        OPTIMIZER,
        "norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), limit)))",
        "norms.append(float(nn.utils.clip_grad_norm_([p for each, _ in owned for p in each.values()], limit)))",
        "a task with large gradients slows all the others down",
        (PROOF,),
    ),
    Fault(
        "one mean over the tokens of all tasks",
        TRAINER,
        "found += self._count(",
        "found += (lambda *a: (self._count(*a) > 0) * self._count(*a).sum())(",
        "a task with short answers hardly trains beside one with long ones",
        (PROOF,),
    ),
    Fault(
        "absent tasks step by zeros",
        OPTIMIZER,
        "                parameter.grad = None\n",
        "                parameter.grad = torch.zeros_like(parameter)\n",
        "Adam's moments decay and its weights move in steps that a task has no part in",
        (PROOF,),
    ),
    Fault(
        "schedules that do not wait",
        OPTIMIZER,
        "            for owner in self.present():\n",
        "            for owner in range(len(self.taken)):\n",
        "the rate of a rare task falls to zero before its rows have come",
        (PROOF,),
    ),
    Fault(
        "one rate for all tasks",
        OPTIMIZER,
        'groups.append({"params": chosen, "lr": rate, "weight_decay": own})',
        'groups.append({"params": chosen, "lr": owned[0][1], "weight_decay": own})',
        "a task's learning rate is read and not used",
        (PROOF,),
    ),
    Fault(
        "rows of a mixed batch given back in another order",
        HEAD,
        "return filled.index_select(0, torch.cat(places).argsort())",
        "return filled",
        "a head's answers are compared with the labels of other rows",
        (PROOF,),
    ),
    Fault(
        "the base's dropout left on",
        SETUP,
        "    if switch_off_dropout(base.model):\n",
        "    if False:\n",
        "what a task learns depends on the rows of the others",
        (f"{RUNS}::test_the_base_of_several_tasks_has_no_dropout",),
    ),
    Fault(
        "what is shared is clipped as the most lenient task",
        TRAINER,
        "[self._shared_clip] * bool(self.shared)",
        "[self.args.max_grad_norm] * bool(self.shared)",
        "one task's clip decides how far the A of all may move",
        (f"{RUNS}::test_what_is_shared_is_clipped_as_the_run_says_and_a_task_as_it_says",),
    ),
    Fault(
        "a task's rows come in an order of its place in the list",
        SAMPLER,
        'seeded("rows", self.seed, name, each)',
        'seeded("rows", self.seed, list(self.rows).index(name), each)',
        "adding a task changes the order in which another one sees its rows",
        ("tests/train/test_task_sampler.py::test_a_tasks_rows_come_in_the_order_they_have_without_the_others",),
    ),
    Fault(
        "a pass begins anew in every epoch",
        SAMPLER,
        "first, size = self.epoch * count, len(own)",
        "first, size = 0, len(own)",
        "drawn evenly, most rows of a large task are never seen",
        ("tests/train/test_task_sampler.py::test_no_row_comes_again_before_all_of_its_task_have_come",),
    ),
)
