"""Faults in files without frozen factors, in what LoRA-XS costs, and in what the paper's theorems rest on."""

from __future__ import annotations

from harness import Fault

_FILE = "leantune/methods/_factor_file.py"
_TESTS = ("tests/adapters/test_factor_file.py",)

FACTOR_FILE_FAULTS = (
    Fault(
        "recomputed factors without a rotation of the core",
        _FILE,
        "    return left @ core @ right.t(), max(",
        "    return core, max(",
        "on a machine with another linear algebra library a compact adapter computes something else, silently",
        (f"{_TESTS[0]}::TestRecomputed::test_turned_singular_vectors_give_the_same_change",),
    ),
    Fault(
        "the core turned by the transposes",
        _FILE,
        "    return left @ core @ right.t(), max(",
        "    return left.t() @ core @ right, max(",
        "signs come out right, rotations among equal singular values do not",
        (f"{_TESTS[0]}::TestRecomputed::test_turned_singular_vectors_give_the_same_change",),
    ),
    Fault(
        "a probe that accepts everything",
        _FILE,
        "TOLERANCE = 1e-4\n",
        'TOLERANCE = float("inf")\n',
        "a compact adapter loads over another base, in subspaces that it was not trained in",
        (f"{_TESTS[0]}::TestRecomputed",),
    ),
    Fault(
        "a probe with no rows to spare",
        _FILE,
        "EXTRA = 8\n",
        "EXTRA = 0\n",
        "near singular in some layers: there the core is turned inexactly, and sound files are refused",
        (f"{_TESTS[0]}::TestProbe",),
    ),
    Fault(
        "a turn that stretches is a turn too",
        _FILE,
        "    return turn, max(float((missed / whole.clamp(min=float(floor))).max()), float(bent))\n",
        "    return turn, float((missed / whole.clamp(min=float(floor))).max())\n",
        "a base with the same singular vectors and other values is taken for the one that was trained on",
        (f"{_TESTS[0]}::TestRecomputed::test_another_base_is_refused",),
    ),
    Fault(
        "probe signs from a stream that nobody froze",
        _FILE,
        "    drawn = numpy.random.RandomState(seed).random_sample((rows, columns))\n",
        "    drawn = numpy.random.default_rng(seed).random((rows, columns))\n",
        "a later numpy draws other signs, and every compact file is refused",
        (f"{_TESTS[0]}::TestProbe",),
    ),
    Fault(
        "shared factors by their name alone",
        _FILE,
        "    if found != wanted:\n",
        "    if not found:\n",
        "a damaged or exchanged factor file changes every adapter of the family",
        (f"{_TESTS[0]}::TestShared::test_a_torn_file_and_one_of_other_content_are_refused_and_written_anew",),
    ),
    Fault(
        "a damaged factor file is left as it is",
        "leantune/adapters/factor_file.py",
        "    if not _holds(path, digest):\n",
        "    if not path.is_file():\n",
        "an adapter is saved beside factors that cannot be read",
        (f"{_TESTS[0]}::TestShared::test_a_torn_file_and_one_of_other_content_are_refused_and_written_anew",),
    ),
    Fault(
        "a factor file anywhere on the disk",
        _FILE,
        "Path(self.factor_file).name != self.factor_file:\n",
        "not self.factor_file:\n",
        "a config from outside names a path, and it is read",
        (f"{_TESTS[0]}::TestShared::test_a_file_name_cannot_lead_out_of_the_folder",),
    ),
    Fault(
        "the config goes on saying that the factors are elsewhere",
        _FILE,
        "    config.factors, config.factor_file, config.factor_hash = STORED, None, None\n",
        "",
        "an adapter that was loaded from a small file and saved whole cannot be loaded again",
        (f"{_TESTS[0]}::TestRecomputed::test_it_goes_on_training_and_is_then_saved_whole",),
    ),
    Fault(
        "what was written is not read back",
        "leantune/adapters/factor_file.py",
        "    raise_all([problem] if not errors[worst] <= EXACT else [], AdapterError)\n",
        "",
        "a small file that gives another change gets its name",
        (f"{_TESTS[0]}::test_a_file_that_would_give_another_change_is_not_written",),
    ),
    Fault(
        "frozen factors counted as trained",
        "leantune/adapters/folder.py",
        "if tensor.is_floating_point() and tensor.data_ptr() not in frozen]\n",
        "if tensor.is_floating_point()]\n",
        "a card claims a hundred times the trained parameters",
        (f"{_TESTS[0]}::test_inspect_counts_what_trains_and_says_where_the_factors_are",),
    ),
    Fault(
        "the backward of the core forgotten",
        "leantune/methods/_cost.py",
        "    return Cost(factors + middle, factors + 2 * middle)\n",
        "    return Cost(factors + middle, factors + middle)\n",
        "a training step looks cheaper than it is",
        ("tests/methods/test_cost.py",),
    ),
    Fault(
        "a preconditioner without the square of the scaling",
        "leantune/methods/_core_factor.py",
        "self.scaling**2\n",
        "self.scaling\n",
        "training depends on alpha, which Theorem 4 says it does not",
        ("tests/methods/test_lora_sb_theory.py::TestTheLayer",),
    ),
)
