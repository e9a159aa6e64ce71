"""The run configuration: every setting of a run, from YAML and flags, checked before anything is loaded.

One text per field serves three readers: the description here is the comment in the YAML file and the help of the
command line. All problems of a configuration are reported at once, with the nearest known name for a wrong one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from leantune.core.errors import ConfigError, MethodError, describe, did_you_mean, raise_all
from leantune.train.option import method_options, user_options
from leantune.train.regime import contradictions
from leantune.train.task_config import (
    TaskConfig,
    column_roles,
    first_file,
    named_tasks,
    task_problems,
    with_task,
    without_first_file,
)

if TYPE_CHECKING:
    from leantune.methods import Method

_NOTHING = {"", "null", "none", "~"}
# What users of other tools type: here -> the name of the field.
_SYNONYMS = {"eval_set": "eval_data"}


class RunConfig(BaseModel):
    """Everything that decides a run. Building one checks it; a wrong one raises ConfigError.

    Example:
        ``RunConfig(model="smollm2-135m", data="train.jsonl", method="s2ft", out="runs/first")``
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    model: str = Field(description="Base model: a Hub id, a local folder, a GGUF file, smollm2-135m or minilm-l6")
    data: Path = Field(
        description="Training rows: a jsonl, json, csv, tsv or parquet file, a folder of these, or a Hub data set "
        "(owner/name, owner/name/config:split); with tasks, left out"
    )
    out: Path = Field(description="Run folder to write")
    method: str = Field("s2ft", description="Fine-tuning method; `leantune methods` lists them")
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method; `leantune methods NAME` lists them"
    )
    eval_data: Path | None = Field(
        None,
        description="Rows to measure the loss on; none means no evaluation (also: eval_set, XGBoost's word)",
        json_schema_extra={"synonym": "eval_set"},
    )
    task: Literal["causal-lm", "classification", "regression", "masked-lm", "image-classification"] = Field(
        "causal-lm",
        description="What to train: the language model itself (causal or masked), or a head on top of it. On the "
        "command line a value with '=' is a task of a run with several instead, by its name and file: --task cola=FILE "
        "--task mrpc=FILE ...",
        json_schema_extra={"is_repeated": True},
    )
    tasks: dict[str, TaskConfig] = Field(
        default_factory=dict,
        description="Tasks to train together (multi-lora): a mapping of name to file, or to data, eval_data, kind, lr, "
        "schedule, warmup_ratio, clip, limit, format, columns; on the command line --task name=file, and --set "
        "tasks.NAME.kind=regression",
    )
    task_sampling: Literal["proportional", "uniform", "temperature"] = Field(
        "proportional", description="How often each task's rows are drawn: by their number, equally often, or between"
    )
    task_temperature: float | None = Field(
        None, gt=0, description="T of task_sampling temperature, a share of rows^(1/T): 1 is proportional; null means 2"
    )
    eval_share: float | None = Field(
        None, gt=0, lt=1, description="Share of the training rows to hold out and measure on, by a hash of the prompt"
    )
    format: str | None = Field(
        None,
        description="Format of the rows: messages, sharegpt, alpaca, prompt-completion, image, classification or text; "
        "null means by their columns",
    )
    columns: dict[str, str] | None = Field(
        None, description="Which column means what, where its name does not say: prompt=question,completion=answer"
    )
    chat_template: Path | None = Field(
        None, description="File with the chat template (Jinja) to use; null means the tokenizer's own"
    )
    limit: int | None = Field(None, ge=1, description="Use only the first rows of the training file; null means all")
    max_length: int = Field(1024, ge=2, description="Tokens kept of a row; longer rows are cut and counted")
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs")
    batch_size: int = Field(8, ge=1, description="Rows in a forward pass (packs, with packing)")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes in an optimizer step")
    group_by_length: bool = Field(
        False, description="Put rows of similar length in one batch: less padding, less random batches"
    )
    packing: bool = Field(
        False, description="Put rows together into sequences of max_length tokens, each row seeing itself alone"
    )
    streaming: bool = Field(
        False, description="Read the training file while training, for files larger than memory; needs max_steps"
    )
    shuffle_buffer: int = Field(1000, ge=1, description="Rows held to draw the next one from, with streaming")
    optimizer: str = Field(
        "adamw_torch", description="Optimizer by transformers' name: adamw_torch, sgd, adafactor, lion_32bit, ..."
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate; null means the method's own default")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls to zero after the warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="Decay of the trained parameters, norms and biases left out")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 means no clipping")
    seed: int = Field(0, ge=0, description="Seed of row order, initialisation, dropout and the method's selection")
    calibration_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the training rows that a start or choice made from data is computed from, at least 32 "
        "rows, at most 512; null means the method's own: 0.01, or 0.001 for a start from the first step (lora-sb)",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="Type of the base weights; trained parameters are at least float32"
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none", description="Pack the frozen base weights while they are loaded; what trains stays float32"
    )
    quantization_backend: Literal["auto", "bitsandbytes", "torchao"] = Field(
        "auto", description="Library that packs them; auto takes the first one installed that has the format"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16: matrix products in bfloat16 over these weights (autocast); float32: in their type"
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="Where to train; auto takes an accelerator if there is one"
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time"
    )
    compile: bool = Field(
        False,
        description="Compile the model with torch.compile: minutes at the start, faster steps (needs a C++ compiler)",
    )
    logits: Literal["selected", "all"] = Field(
        "selected", description="Compute logits only where the loss is, or at every position (slower, same numbers)"
    )
    save_steps: int = Field(100, ge=0, description="Steps between checkpoints; 0 means none")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints to keep; older ones are removed")
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations; null means once, at the end")
    log_steps: int = Field(10, ge=1, description="Steps between lines on the screen; metrics.jsonl has every step")
    report_to: list[str] = Field(
        default_factory=list,
        description="Trackers that get every step: tensorboard, wandb, trackio, mlflow, ... or all that are installed",
    )
    run_name: str | None = Field(None, description="Name of the run in trackers; null means the run folder's")
    overwrite: bool = Field(False, description="Replace a run that is already in the run folder")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the base model")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model")

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """``wandb,mlflow`` as a list; none as an empty one."""
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        is_list = isinstance(value, (list, tuple))
        return [name for name in value if str(name) not in _NOTHING] if is_list else value if value else []

    _roles = field_validator("columns", mode="before")(column_roles)

    def __init__(self, **values: Any) -> None:
        values = {_SYNONYMS.get(name, name): value for name, value in first_file(values).items()}
        problems: list[str] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [_problem(item, type(self).model_fields) for item in error.errors()]
        problems += _method_problems(values)
        if not problems:
            problems = self._contradictions() + contradictions(self) + task_problems(self)
        raise_all(problems, ConfigError)
        self.method_options = method_options(self.chosen_method, self.method_options)[0]

    @property
    def chosen_method(self) -> Method:
        """The method behind the name."""
        from leantune.methods import get

        return get(self.method)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the one given, or the method's own."""
        return self.lr if self.lr is not None else self.chosen_method.default_learning_rate

    def resolved(self) -> RunConfig:
        """A copy in which what was left to the method and the machine is decided.

        Raises:
            DependencyError: no library that could quantise is installed.
        """
        from leantune.models.quantisation import resolve

        backend = resolve(self.quantization, self.quantization_backend)
        share = self.calibration_share or self.chosen_method.calibration_share
        decided = {"lr": self.learning_rate, "quantization_backend": backend, "calibration_share": share}
        return self.model_copy(update=decided)

    def _contradictions(self) -> list[str]:
        found = []
        has_rows = any(task.eval_data is not None for task in self.tasks.values())
        if self.eval_steps is not None and self.eval_data is None and self.eval_share is None and not has_rows:
            got = f"{self.eval_steps} without eval_data"
            do = "set eval_data or eval_share, or drop eval_steps"
            found.append(describe("eval_steps", got, "rows to evaluate on", do))
        if self.eval_share is not None and self.eval_data is not None:
            got = f"{self.eval_share:g} beside eval_data {self.eval_data.as_posix()}"
            do = "drop eval_share to evaluate on the file, or eval_data to hold rows out"
            found.append(describe("eval_share", got, "one set of rows to evaluate on", do))
        if self.chat_template is not None and self.task == "image-classification":
            got = f"{self.chat_template.as_posix()} with task {self.task}, whose models have no tokenizer"
            found.append(describe("chat_template", got, "a task with text", "leave it out"))
        if self.quantization != "none" and not self.chosen_method.is_adapter:
            got = f"'{self.quantization}' with method {self.method}, which trains the base weights themselves"
            found.append(describe("quantization", got, "an adapter beside packed weights", "choose s2ft or lora"))
        if self.quantization != "none" and self.dtype == "float64":
            got = f"float64 with quantization '{self.quantization}'"
            found.append(describe("dtype", got, "float32, bfloat16 or float16, to compute in", "change one"))
        return found

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
        """Read a recipe; ``key=value`` overrides win over the file.

        Args:
            path: the YAML file.
            overrides: ``lr=1e-3``, ``method_options.ratio=0.05``, or ``ratio=0.05`` for an option of the method.

        Raises:
            ConfigError: the file cannot be read, or the configuration is wrong; all problems at once.
        """
        return cls(**apply_overrides(_read_yaml(Path(path)), overrides))

    def to_yaml(self) -> str:
        """The configuration as YAML, every field under its description; reading it back gives an equal one."""
        lines = ["# leantune train <this file> repeats this run."]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            plain = value.as_posix() if isinstance(value, Path) else value
            if name == "tasks":
                plain = {each: task.model_dump(mode="json", exclude_none=True) for each, task in self.tasks.items()}
            lines += textwrap.wrap(str(field.description), 110, initial_indent="# ", subsequent_indent="#   ")
            lines.append(yaml.safe_dump({name: _plain(plain)}, sort_keys=False, allow_unicode=True).rstrip())
        return "\n".join(lines) + "\n"


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``values`` with ``key=value`` settings on top; a key may name an option of the method.

    Raises:
        ConfigError: a setting has no ``=``, or names neither a field nor an option.
    """
    merged = without_first_file(values)
    raw_options = merged.get("method_options")
    options = dict(raw_options) if isinstance(raw_options, dict) else {}
    settings, problems = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals:
            settings.append((_SYNONYMS.get(key.strip(), key.strip()), text.strip()))
        else:
            problems.append(describe(f"setting '{override}'", "no '='", "key=value", f"write {override}=VALUE"))
    fields = RunConfig.model_fields
    tasks, wrong = named_tasks(settings)
    problems += wrong
    for name, path in tasks.items():
        merged = with_task(merged, name, "data", path)
    settings = [(key, text) for key, text in settings if key != "task" or "=" not in text]
    for key, text in settings:
        value = None if text.lower() in _NOTHING else text
        if key == "tasks":
            merged[key] = yaml.safe_load(text)
        elif key in fields and key != "method_options":
            merged[key] = value
        elif key.startswith("tasks.") and key.count(".") > 1:
            _, name, setting = key.split(".", 2)
            merged = with_task(merged, name, setting, value)
    known = _option_names(merged.get("method", fields["method"].default))
    for key, text in settings:
        name = key.removeprefix("method_options.")
        if key == "method_options":
            options = yaml.safe_load(text) or {}
        elif key != name or (key not in fields and key in known):
            options[name] = yaml.safe_load(text)
        elif key not in fields and not (key.startswith("tasks.") and key.count(".") > 1):
            problems.append(
                describe(f"setting '{key}'", "unknown", did_you_mean(key, [*fields, *known]), "mend the name")
            )
    raise_all(problems, ConfigError)
    if options:
        merged["method_options"] = options
    return merged


class _UniqueNames(yaml.SafeLoader):
    """Refuses a name that stands twice in a table, of which YAML would take the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A table of the file."""
        merge = "tag:yaml.org,2002:merge"
        names = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        twice = next((key for place, key in enumerate(names) if key in names[:place]), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice}' stands twice in one table, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # A subclass of yaml's safe loader.
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueNames)
    except FileNotFoundError as error:
        raise ConfigError(describe(str(path), "not there", "a YAML recipe", "check the path")) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            describe(str(path), " ".join(str(error).split()), "a readable YAML recipe", "mend the file")
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(describe(str(path), "not a table of settings", "lines of `key: value`", "mend the file"))
    return values


def _option_names(method: Any) -> list[str]:
    from leantune.methods import get

    try:
        return sorted(user_options(get(str(method)).config))
    except MethodError:
        return []


def _method_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with the method and its options, found even when other fields are wrong too."""
    from leantune.methods import get

    name = values.get("method", RunConfig.model_fields["method"].default)
    options = values.get("method_options") or {}
    if not isinstance(name, str) or not isinstance(options, dict):
        return []
    try:
        method = get(name)
    except MethodError as error:
        return [str(error)]
    return method_options(method, options)[1]


def _problem(item: Any, fields: Iterable[str]) -> str:
    """One pydantic error in our words."""
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden" and item["loc"][0] == "tasks":
        near = did_you_mean(str(item["loc"][-1]), TaskConfig.model_fields)
        return describe(where, "unknown setting", near, "mend the name or drop the line")
    if item["type"] == "extra_forbidden":
        return describe(where, "unknown setting", did_you_mean(where, fields), "mend the name or drop the line")
    if item["type"] == "missing":
        return describe(where, "missing", "this setting has no default", f"set {where}")
    said = item["msg"].removeprefix("Value error, ")
    wanted = said[0].lower() + said[1:]
    return describe(where, f"{item['input']!r}", wanted, "change the value")


def _plain(value: Any) -> Any:
    """Values that YAML can hold: sets and tuples of options become lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return str(value)
