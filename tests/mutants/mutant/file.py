"""Faults in what is written, read back, exported and pushed."""

from __future__ import annotations

from harness import Fault

FILE_FAULTS = (
    Fault(
        "a file written in place",
        "leantune/core/atomic.py",
        "        os.replace(temporary, path)\n",
        "        path.write_bytes(data)\n",
        "a kill while run.json is written leaves half of it",
        ("tests/core/test_atomic.py",),
    ),
    Fault(
        "renamed before it is on the disk",
        "leantune/core/atomic.py",
        "        _fsync_tree(temporary)\n",
        "",
        "after a power cut the folder is there and its files are empty",
        ("tests/core/test_atomic.py",),
    ),
    Fault(
        "forgotten scaling",
        "leantune/adapters/layer.py",
        "return B.to(wide) * layer.scaling[adapter_name], A.to(wide)",
        "return B.to(wide), A.to(wide)",
        "an exported LoRA acts at alpha / r of its strength",
        ("tests/adapters/test_lora_conversion.py::test_the_file_holds_the_change_of_every_weight",),
    ),
    Fault(
        "an adapter over any base",
        "leantune/adapters/verification.py",
        "    if given_hash == wanted:\n",
        "    if given_hash:\n",
        "an adapter loads over weights it was not trained on, and answers nonsense",
        ("tests/adapters/test_adapter_folder.py::TestBase::test_other_weights_are_refused",),
    ),
    Fault(
        "an index outside the weight is believed",
        "leantune/adapters/verification.py",
        "        if low < 0 or high >= size:\n",
        "        if low < 0 and high >= size:\n",
        "a damaged file changes other weights than it names",
        ("tests/adapters/test_adapter_folder.py::test_indices_that_name_no_entry_are_refused",),
    ),
    Fault(
        "a file gets its name before it is on the disk",
        "leantune/core/atomic.py",
        "                os.fsync(file.fileno())\n            os.replace(temporary, path)\n",
        "                os.replace(temporary, path)\n                os.fsync(file.fileno())\n",
        "after a power cut run.json is there and empty",
        ("tests/core/test_atomic.py::test_everything_is_flushed_before_it_is_renamed",),
    ),
    Fault(
        "what a living process is writing is cleared away",
        "leantune/core/atomic.py",
        '        return not _exists(int(match["process"]))\n',
        '        return bool(int(match["process"]))\n',
        "two runs into one folder: the second removes the checkpoint that the first is writing",
        ("tests/core/test_atomic.py::test_the_next_writer_clears_away_what_a_dead_one_left_and_nobody_elses",),
    ),
)

HUB_FAULTS = (
    Fault(
        "any base may have the id that is given",
        "leantune/adapters/publication.py",
        'if not known.get("content_hash") or opened.content_hash != known["content_hash"]:',
        'if not known.get("content_hash") or not opened.content_hash:',
        "a model card names a base that the adapter was never trained on",
        ("tests/adapters/test_hub.py::test_a_hub_id_only_where_the_weights_are_the_same",),
    ),
    Fault(
        "one alpha for modules of several ranks",
        "leantune/adapters/conversion.py",
        '        "alpha_pattern": dict(pattern),\n',
        '        "alpha_pattern": {},\n',
        "an exported LoRA acts at another strength wherever a module's rank is not the common one",
        ("tests/adapters/test_lora_conversion.py::test_without_padding_each_module_keeps_its_rank",),
    ),
)
