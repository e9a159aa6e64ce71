"""Adapter files without their frozen factors: recomputed and turned into place, or shared, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import TARGETS, answers, fill, make_llama, state_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import leantune
from leantune import LoraXSConfig, cli
from leantune.adapters import convert_to_lora, export_run, factor_file, inspect_adapter, merge
from leantune.adapters import folder as adapter_folder
from leantune.adapters.verification import read_config
from leantune.core.errors import AdapterError, ConfigError
from leantune.methods import _factor_file as factors
from leantune.testing.closeness import assert_close, assert_same, assert_same_state

RANK = 3
PINNED = [[-1, 1, -1, -1, -1, -1, 1, 1], [1, 1, 1, -1, 1, -1, -1, 1], [-1, -1, -1, -1, -1, 1, -1, -1]]


def config(**options: Any) -> LoraXSConfig:
    settings = {"r": RANK, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM"}
    return LoraXSConfig(**{**settings, **options})


def lora_xs(base: Any = None, **options: Any) -> PeftModel:
    """A trained-looking LoRA-XS; in a base with three equal singular values, which no decomposition tells apart."""
    model = get_peft_model(degenerate(make_llama()) if base is None else base, config(**options))
    fill(model)
    return model.eval()


def degenerate(model: Any) -> Any:
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    U, S, Vh = torch.linalg.svd(weight.detach().double())
    S[:RANK] = S[0]
    weight.data.copy_(U * S @ Vh)
    return model


def lora_sb(**options: Any) -> PeftModel:
    model = get_peft_model(make_llama(), config(init_weights="update_svd", **options))
    ids = torch.tensor([[5, 9, 13, 21, 7, 3], [30, 31, 32, 33, 34, 35]])
    leantune.initialize(model, [{"input_ids": ids, "labels": ids}], step_size=1e-2)
    return model.eval()


def deltas(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    return {core.path: core.factors.delta().double() for core in factors.cores(model, adapter)}


def assert_same_change(got: PeftModel, wanted: PeftModel) -> None:
    mine, theirs = deltas(got), deltas(wanted)
    assert mine.keys() == theirs.keys()
    assert len(theirs) == 8
    for path, truth in theirs.items():
        # 1e-5 of the change, as the files promise: 84 roundings of float32.
        assert_close(mine[path], truth, torch.float32, k=84, depth=1, what=path)


def refused(base: Any, folder: Path, **options: Any) -> str:
    """The error text of a refused load, after which the base is bit for bit as before."""
    before = state_of(base)
    with pytest.raises(AdapterError) as caught:
        leantune.load(base, folder, **options)
    assert_same_state(state_of(base), before)
    return str(caught.value)


class TestRecomputed:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return adapter_folder.save(lora_xs(), tmp_path / "compact", factors="recomputed")

    def test_the_file_holds_the_core_and_a_probe(self, folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        names = {key.rpartition(".")[2] for key in tensors}
        assert names == {"weight", "probe_B", "probe_A"}
        per_layer = RANK**2 + 2 * RANK * (RANK + factors.EXTRA)
        assert sum(tensor.numel() for tensor in tensors.values()) == 8 * per_layer

    def test_on_the_same_machine_it_comes_back_bit_for_bit(self, folder: Path) -> None:
        model = leantune.load(degenerate(make_llama()), folder)
        assert_same_state(deltas(model), deltas(lora_xs()))
        for got, wanted in zip(answers(model), answers(lora_xs()), strict=True):
            assert_same(got, wanted)

    def test_peft_alone_loads_it_once_leantune_is_imported(self, folder: Path) -> None:
        model = PeftModel.from_pretrained(degenerate(make_llama()), folder)
        assert_same_state(deltas(model), deltas(lora_xs()))
        model.load_adapter(folder, "second")
        assert_same_state(deltas(model, "second"), deltas(lora_xs()))

    @pytest.mark.parametrize("split", ["left", "core", "right"])
    def test_turned_singular_vectors_give_the_same_change(
        self, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What another library may answer: other signs everywhere, a rotation where singular values coincide."""
        trained = lora_xs(split=split)
        folder = adapter_folder.save(trained, tmp_path / "compact", factors="recomputed")
        turn_decompositions(monkeypatch)
        model = leantune.load(degenerate(make_llama()), folder)
        assert_same_change(model, trained)
        for mine, theirs in zip(factors.cores(model, "default"), factors.cores(trained, "default"), strict=True):
            # Not because nothing was turned: with its own R, these factors would give another change.
            unturned = mine.factors.B @ theirs.factors.weight.detach() @ mine.factors.A
            assert float((unturned - theirs.factors.delta()).norm()) > 0.1 * float(theirs.factors.delta().norm())

    def test_another_base_is_refused(self, folder: Path) -> None:
        other = make_llama()
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(8))
        # The same singular vectors, with other values.
        for base in (other, make_llama(initializer_range=0.31)):
            text = refused(base, folder)
            assert "off by the stored probe" in text
            assert "load the very base it was trained on" in text

    def test_a_base_that_moved_a_little_is_refused_and_so_is_a_core_of_zeros(self, tmp_path: Path) -> None:
        """The probe sees the subspaces themselves, also where nothing was trained yet."""
        model = lora_xs()
        for core in factors.cores(model, "default"):
            core.factors.weight.data.zero_()
        folder = adapter_folder.save(model, tmp_path / "compact", factors="recomputed")
        base = degenerate(make_llama())
        weight = base.get_submodule("model.layers.1.mlp.down_proj").weight
        weight.data += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        assert "module model.layers.1.mlp.down_proj" in refused(base, folder)

    def test_a_base_of_other_shapes_is_refused(self, folder: Path) -> None:
        assert "compact adapter, module" in refused(make_llama(hidden_size=32), folder)

    def test_a_probe_that_is_missing_is_refused(self, folder: Path) -> None:
        from test_adapter_folder import rewrite

        rewrite(folder, lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("probe_A"))))
        assert "probe_A: missing" in refused(degenerate(make_llama()), folder)

    def test_it_goes_on_training_and_is_then_saved_whole(self, folder: Path, tmp_path: Path) -> None:
        model = leantune.load(degenerate(make_llama()), folder, trainable=True)
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"weight"}
        adapter_folder.save(model, tmp_path / "whole")
        saved = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
        assert saved["factors"] == "stored"
        assert_same_state(deltas(leantune.load(degenerate(make_llama()), tmp_path / "whole")), deltas(lora_xs()))

    def test_ranks_by_layer(self, tmp_path: Path) -> None:
        def uneven() -> Any:
            base = make_llama()
            base.get_submodule("model.layers.1.mlp.up_proj").weight.data *= 4
            return base

        trained = lora_xs(uneven(), r="auto", rank_budget=RANK)
        ranks = {core.factors.rank for core in factors.cores(trained, "default")}
        assert len(ranks) > 1
        folder = adapter_folder.save(trained, tmp_path / "compact", factors="recomputed")
        assert_same_change(leantune.load(uneven(), folder), trained)

    def test_a_start_from_data_cannot_be_recomputed(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="not from the weight; init_weights='weight_svd'"):
            adapter_folder.save(lora_sb(), tmp_path / "compact", factors="recomputed")
        assert not (tmp_path / "compact").exists()

    def test_factors_that_were_changed_cannot(self, tmp_path: Path) -> None:
        model = lora_xs()
        next(factors.cores(model, "default")).factors.B[0] += 0.1
        with pytest.raises(AdapterError, match="off by the stored probe"):
            adapter_folder.save(model, tmp_path / "compact", factors="recomputed")

    def test_nor_can_those_of_another_method_or_over_a_merged_base(self, s2ft: Any, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="S2FTConfig has no frozen factors"):
            adapter_folder.save(s2ft(), tmp_path / "compact", factors="recomputed")
        model = lora_xs()
        model.merge_adapter()
        with pytest.raises(AdapterError, match="merged"):
            adapter_folder.save(model, tmp_path / "compact", factors="recomputed")
        with pytest.raises(AdapterError, match="did you mean 'recomputed'"):
            adapter_folder.save(model, tmp_path / "compact", factors="recompute")


def turn_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a decomposition has other signs, and equal singular values have other vectors."""
    decompose = factors.low_rank_start.decompose

    def turned(matrix: Tensor, rank: int, *words: object) -> Any:
        start = decompose(matrix, rank, *words)
        turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=start.U.dtype))[:rank, :rank]
        if float(start.S[0] - start.S[-1]) < 1e-6 * float(start.S[0]):
            random = torch.randn(rank, rank, generator=torch.Generator().manual_seed(5), dtype=start.U.dtype)
            turn = torch.linalg.qr(random).Q
        start.U, start.Vh = start.U @ turn, turn.T @ start.Vh
        return start

    monkeypatch.setattr(factors.low_rank_start, "decompose", turned)


class TestShared:
    @pytest.fixture
    def family(self, tmp_path: Path) -> Path:
        """Two adapters of one start, trained apart."""
        model = lora_sb()
        own = model.peft_config["default"]
        model.add_adapter("second", own)
        for core in factors.cores(model, "second"):
            core.factors.weight.data += 0.3
        adapter_folder.save(model, tmp_path / "family" / "first", factors="shared")
        adapter_folder.save(model, tmp_path / "family" / "second", adapter_name="second", factors="shared")
        return tmp_path / "family"

    def test_the_factors_are_there_once(self, family: Path) -> None:
        files = sorted(path.name for path in family.iterdir())
        assert files[1:] == ["first", "second"]
        assert files[0].startswith("factors-")
        names = {key.rpartition(".")[2] for key in load_file(family / "second" / "adapter_model.safetensors")}
        assert names == {"weight"}
        whole = adapter_folder.save(lora_sb(), family.parent / "whole")
        stored = load_file(whole / "adapter_model.safetensors")
        assert len(load_file(family / files[0])) == 2 * len(stored) // 3

    def test_each_comes_back_bit_for_bit(self, family: Path) -> None:
        model = leantune.load(make_llama(), family / "first")
        leantune.load(model, family / "second", adapter_name="second")
        assert_same_state(deltas(model), deltas(lora_sb()))
        for first, second in zip(factors.cores(model, "default"), factors.cores(model, "second"), strict=True):
            assert_same(second.factors.weight, first.factors.weight + 0.3)
            assert_same(second.factors.B, first.factors.B)
        model = PeftModel.from_pretrained(make_llama(), family / "first")
        assert_same_state(deltas(model), deltas(lora_sb()))

    def test_a_family_moves_as_a_whole_and_a_file_may_lie_inside(self, family: Path, tmp_path: Path) -> None:
        moved = shutil.move(family, tmp_path / "elsewhere")
        assert_same_state(deltas(leantune.load(make_llama(), moved / "first")), deltas(lora_sb()))
        (shared,) = moved.glob("factors-*")
        shutil.move(shared, moved / "first" / shared.name)
        assert_same_state(deltas(leantune.load(make_llama(), moved / "first")), deltas(lora_sb()))
        assert "copy that file beside" in refused(make_llama(), moved / "second")

    def test_a_missing_file_is_named_with_where_it_was_looked_for(self, family: Path) -> None:
        (shared,) = family.glob("factors-*")
        shared.unlink()
        text = refused(make_llama(), family / "first")
        assert text.startswith(shared.name)
        assert f"neither in {family / 'first'} nor above it" in text
        with pytest.raises(AdapterError, match="neither in"):
            PeftModel.from_pretrained(make_llama(), family / "first")

    def test_a_torn_file_and_one_of_other_content_are_refused_and_written_anew(self, family: Path) -> None:
        (shared,) = family.glob("factors-*")
        whole = shared.read_bytes()
        for damaged, said in ((whole[:200], "torn"), (whole[:-4] + b"\0\0\0\1", "other content")):
            shared.write_bytes(damaged)
            assert said in refused(make_llama(), family / "first")
        adapter_folder.save(lora_sb(), family / "third", factors="shared")
        assert shared.read_bytes() == whole
        assert_same_state(deltas(leantune.load(make_llama(), family / "first")), deltas(lora_sb()))

    def test_a_base_of_other_shapes_is_refused(self, family: Path) -> None:
        assert "shared factors: base_model.model." in refused(make_llama(hidden_size=32), family / "first")

    def test_other_factors_have_a_file_of_their_own(self, family: Path) -> None:
        adapter_folder.save(lora_xs(), family / "third", factors="shared")
        assert len(list(family.glob("factors-*"))) == 2
        assert_same_state(deltas(leantune.load(degenerate(make_llama()), family / "third")), deltas(lora_xs()))

    def test_a_file_name_cannot_lead_out_of_the_folder(self) -> None:
        with pytest.raises(ConfigError, match="without a path"):
            config(factors="shared", factor_file="../../etc/factors.safetensors")
        with pytest.raises(ConfigError, match="did you mean 'shared'"):
            config(factors="shard")


@pytest.mark.parametrize("form", ["recomputed", "shared"])
def test_inspect_counts_what_trains_and_says_where_the_factors_are(form: str, tmp_path: Path) -> None:
    trained = lora_xs()
    parameters = 8 * RANK**2
    assert inspect_adapter(adapter_folder.save(trained, tmp_path / "whole"))["parameters"] == parameters
    facts = inspect_adapter(adapter_folder.save(trained, tmp_path / "other", factors=form))
    assert facts["parameters"] == parameters
    assert "factors" not in facts["config"]
    assert {"recomputed": "recomputed from the base", "shared": str(tmp_path)}[form] in facts["factors"]
    assert 0 <= json.loads((tmp_path / "other" / "leantune.json").read_text())["factor_error"] <= factor_file.EXACT


def test_a_file_that_would_give_another_change_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = factor_file.complete

    def wrong(*arguments: Any) -> dict[str, Tensor]:
        return {key: 1.001 * tensor for key, tensor in complete(*arguments).items()}

    monkeypatch.setattr(factor_file, "complete", wrong)
    with pytest.raises(AdapterError, match=r"its change would come back 3\.00e-03 off"):
        adapter_folder.save(lora_xs(), tmp_path / "small", factors="recomputed")
    assert not (tmp_path / "small").exists()


def test_the_cards_say_what_a_folder_needs(tmp_path: Path) -> None:
    adapter_folder.save(lora_xs(), tmp_path / "compact", factors="recomputed")
    assert "decomposed from the base weights" in (tmp_path / "compact" / "README.md").read_text()
    adapter_folder.save(lora_xs(), tmp_path / "first", factors="shared")
    (shared,) = tmp_path.glob("factors-*")
    assert shared.name in (tmp_path / "first" / "README.md").read_text()


@pytest.mark.parametrize("form", ["recomputed", "shared"])
def test_they_become_plain_lora_without_the_model_at_hand(
    form: str, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    base = leantune.load_base(str(base_folders["llama"]))
    trained = lora_xs(base.model)
    folder = adapter_folder.save(trained, tmp_path / "small", base=base, factors=form)
    convert_to_lora(folder, tmp_path / "lora")
    again = PeftModel.from_pretrained(leantune.load_base(str(base_folders["llama"])).model, tmp_path / "lora")
    for got, wanted in zip(answers(again), answers(trained), strict=True):
        assert_close(got, wanted.double(), torch.float32, k=16, depth=2 * 7)


class TestRuns:
    """`leantune export` and `leantune merge` of a run, from and to the smaller forms."""

    @pytest.fixture
    def run(self, base_folders: dict[str, Path], tmp_path: Path) -> Path:
        base = leantune.load_base(str(base_folders["llama"]))
        trained = lora_xs(base.model)
        adapter_folder.save(trained, tmp_path / "run" / "adapter", base=base, tokenizer=base.tokenizer)
        (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "complete", "base": {"name": base.name}}))
        return tmp_path / "run"

    @pytest.mark.parametrize("form", ["lora-xs", "shared-factors"])
    def test_there_and_back(self, form: str, run: Path, tmp_path: Path) -> None:
        small = tmp_path / "family" / "small"
        result = export_run(run, small, format=form)
        assert result["bytes"]["written"] < result["bytes"]["native"]
        assert (result["bytes"]["shared"] > 0) == (form == "shared-factors")
        assert json.loads((run / "run.json").read_text())["exports"][-1]["format"] == form
        assert (small / "tokenizer.json").is_file()
        again = export_run(small, tmp_path / "whole", format="native")
        assert again["factor_error"] == 0
        files = [load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "whole")]
        assert_same_state(files[1], files[0])

    def test_a_smaller_form_merges_as_the_whole_one(self, run: Path, tmp_path: Path) -> None:
        export_run(run, tmp_path / "small", format="lora-xs")
        merged = []
        for folder in (run / "adapter", tmp_path / "small"):
            opened = adapter_folder.recorded_base(folder)
            model = leantune.load(opened, folder)
            merge(model, tmp_path / f"merged-{folder.name}", verify=False)
            merged.append(load_file(tmp_path / f"merged-{folder.name}" / "model.safetensors"))
        assert_same_state(merged[1], merged[0])

    def test_refusals(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="did you mean 'lora-xs'"):
            export_run(run, tmp_path / "small", format="loraxs")
        with pytest.raises(AdapterError, match="leave them out"):
            export_run(run, tmp_path / "small", format="lora-xs", rank=2)
        assert not (tmp_path / "small").exists()

    def test_the_command(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            cli.main(["export", str(run), "--out", str(tmp_path / "family" / "a"), "--format", "shared-factors"])
        assert not left.value.code
        out = capsys.readouterr().out
        assert "shared factors" in out
        assert "off the trained change" in out
        (shared,) = (tmp_path / "family").glob("factors-*")
        assert factor_file.files_of(tmp_path / "family" / "a", read_config(tmp_path / "family" / "a")) == [shared]


class TestProbe:
    def test_its_signs_are_the_same_everywhere(self) -> None:
        """Pinned: a file of today must be read by every later version of numpy and torch."""
        drawn = factors.signs(3, 8, "A model.layers.0.self_attn.q_proj")
        assert drawn.abs().unique().tolist() == [1.0]
        assert drawn.to(int).tolist() == PINNED

    def test_the_least_squares_are_well_posed_in_every_layer(self) -> None:
        """As many signs as unknowns would be near to singular in some of them, and refuse what is the same."""
        basis = torch.linalg.qr(torch.randn(40, RANK, generator=torch.Generator().manual_seed(4))).Q
        conditions = []
        for number in range(50):
            conditions += [torch.linalg.cond(part) for part in factors.probe(basis, basis.T, f"layers.{number}")]
        assert max(conditions) < 10

    def test_a_turn_is_found_and_another_subspace_is_not_taken_for_one(self) -> None:
        generator = torch.Generator().manual_seed(1)
        B, A, R, turn = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((40, RANK), (RANK, 30), (RANK, RANK), (RANK, RANK))
        )
        turn = torch.linalg.qr(turn).Q
        stored = factors.probe(B, A, "x")
        new, missed = factors.turned(R, stored, factors.probe(B @ turn, turn @ A, "x"))
        assert missed < 1e-10
        assert_close(B @ turn @ new @ turn @ A, B @ R @ A, torch.float64, k=1e4, depth=RANK)
        for seen in ((B + 1e-3 * B.roll(1, 0), A), (B, A + 1e-3 * A.roll(1, 1))):
            _, missed = factors.turned(R, stored, factors.probe(*seen, "x"))
            assert missed > factors.TOLERANCE

    def test_the_error_is_that_of_the_products(self) -> None:
        generator = torch.Generator().manual_seed(2)
        first, second = (
            tuple(torch.randn(*shape, generator=generator) for shape in ((40, RANK), (RANK, RANK), (RANK, 30)))
            for _ in range(2)
        )
        dense = [B.double() @ R.double() @ A.double() for B, R, A in (first, second)]
        wanted = float((dense[0] - dense[1]).norm() / dense[1].norm())
        assert factor_file.relative_error(first, second) == pytest.approx(wanted, rel=1e-9)
        assert factor_file.relative_error(first, first) < 1e-12
