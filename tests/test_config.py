"""Settings: the three ways in give one value; every mistake is said, once, with the way out."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies as registered  # noqa: F401  fills METHODS
from fedlora.config import (
    FLOWER_ONLY,
    METHOD_NAMES,
    AttackConfig,
    MethodName,
    RunConfig,
    TrainingConfig,
    differences,
    digest,
    flat,
    load_config,
    local_training,
    to_toml,
    with_method,
)
from fedlora.errors import ConfigError
from fedlora.state import LocalTraining
from strategies.base import METHODS

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
SCENARIOS = Path(__file__).parents[1] / "simulations" / "scenarios"
ATTACKS = get_args(AttackConfig.model_fields["kind"].annotation)[1:]  # all but none

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(
    lambda w: w.lower() != "none"
)
positive = st.integers(1, 2000)
share = st.floats(0, 1, exclude_min=True)
scale = st.floats(1e-6, 1e3)


def maybe(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | values


# Values as TOML would hold them (None: absent), by dotted key; those that are left out keep their defaults.
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": words,
        "seed": st.integers(0, 2**31),
        "model.revision": maybe(words),
        "model.target_modules": st.just("all-linear") | st.lists(words, min_size=1, max_size=3),
        "model.labels": st.lists(words, max_size=3),
        "data.columns": st.dictionaries(words, words, max_size=2),
        "data.holdout": st.floats(0, 0.99),
        "data.skills": st.lists(words, max_size=3),
        "lora.ranks": st.lists(positive, min_size=1, max_size=4),
        "lora.alpha": maybe(scale),
        "rounds.fraction": share,
        "training.clip_norm": maybe(scale),
        "training.learning_rate": scale,
        "training.autocast": st.booleans(),
        "method.warm_start": st.booleans(),
        "method.max_rank": maybe(positive),
        "wire.up": st.sampled_from(["float32", "float16", "bfloat16", "int8", "int4"]),
    },
)
LENGTH = st.sampled_from([{}, {"training.local_steps": 7}, {"training.local_epochs": 1.5}])


def nested(values: dict[str, object]) -> dict[str, object]:
    """An oracle of its own: dotted keys as TOML tables; None has no TOML, the word `none` stands for it."""
    top: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (top.setdefault(section, {}) if section else top)[name] = "none" if value is None else value
    return top


def as_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "none" if value is None else str(value)


@given(CHANGES, LENGTH)
@settings(deadline=None, max_examples=50)
def test_toml_overrides_and_flower_give_the_same_value(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object], length: dict[str, object]
) -> None:
    values = changes | length
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(tomli_w.dumps(nested(values)), encoding="utf-8")
    from_file = load_config(path)
    assert load_config(overrides=[f"{k}={as_text(v)}" for k, v in values.items()]) == from_file
    assert load_config(flower=flat(from_file)) == from_file
    path.write_text(to_toml(from_file), encoding="utf-8")
    assert load_config(path) == from_file
    for key, value in values.items():  # and it is the value that was asked for
        section, _, name = key.rpartition(".")
        got = getattr(getattr(from_file, section) if section else from_file, name)
        assert (list(got) if isinstance(got, tuple) and isinstance(value, list) else got) == value


def test_lists_and_tables_as_people_write_them() -> None:
    config = load_config(
        overrides=["lora.ranks=16, 8,4", "model.target_modules=q_proj,v_proj", "data.columns=input=q,output=a"]
    )
    assert config.lora.ranks == (16, 8, 4)
    assert config.model.target_modules == ("q_proj", "v_proj")
    assert config.data.columns == {"input": "q", "output": "a"}
    assert load_config(overrides=["lora.ranks=8"]).lora.ranks == (8,)
    assert load_config(flower={"lora.ranks": 8}).lora.ranks == (8,)
    assert load_config(overrides=["data.columns.input=q", "data.columns.output=a"]).data.columns == config.data.columns
    assert load_config(overrides=["method.max_rank=none"]) == load_config(overrides=["seed="]) == RunConfig()
    assert load_config(overrides=['model.labels=["yes, please","no"]']).model.labels == ("yes, please", "no")


def test_later_sources_win_and_tables_grow(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('seed = 1\n[data]\nname = "x.csv"\ncolumns = "input=q"\n[rounds]\ncount = 3\n')
    config = load_config(path, ["seed=3", "data.columns.output=a"], {**flat(RunConfig()), "seed": 2, "rounds.count": 4})
    assert (config.seed, config.rounds.count, config.data.columns) == (3, 4, {"input": "q", "output": "a"})


def test_epochs_replace_steps_wherever_they_are_set(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[training]\nlocal_steps = 10\n")
    for config in (
        load_config(overrides=["training.local_epochs=1"]),
        load_config(path, ["training.local_epochs=1"]),
        load_config(flower={**flat(RunConfig()), "training.local_epochs": 1}),
        RunConfig(training=TrainingConfig(local_epochs=1)),
    ):
        assert (config.training.local_steps, config.training.local_epochs) == (None, 1.0)
    path.write_text("[training]\nlocal_epochs = 2\n")
    back = load_config(path, ["training.local_steps=5"])
    assert (back.training.local_steps, back.training.local_epochs) == (5, None)


def test_data_of_your_own_is_dealt_evenly_unless_said_otherwise() -> None:
    assert load_config(overrides=["data.name=rows.csv"]).data.partition.kind == "iid"
    natural = ["data.name=rows.csv", "data.partition.kind=natural", "data.partition.key=hospital"]
    assert load_config(overrides=natural).data.partition.kind == "natural"
    assert load_config(flower={**flat(RunConfig()), "data.name": "rows.csv"}).data.partition.kind == "iid"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["training.learning_rat=1"],
            r"training\.learning_rat: no such setting; the nearest is training\.learning_rate",
        ),
        (["learning_rate=1"], r"learning_rate: no such setting; the nearest is training\.learning_rate"),
        (["trainin.threads=1"], r"the nearest is training\.threads"),
        (["training.learning_rate=0"], r"training\.learning_rate: must be a number > 0 or none, got '0'"),
        (["training.learning_rate=inf"], r"training\.learning_rate: must be a number > 0 or none, got 'inf'"),
        (["training.learning_rate=fast"], r"must be a number > 0 or none, got 'fast'"),
        (["data.holdout=1"], r"data\.holdout: must be a number >= 0 and < 1, got '1'"),
        (["lora.ranks=8,0"], r"lora\.ranks: must be a list, each a whole number >= 1, got '8,0'"),
        (["lora.ranks=none"], r"lora\.ranks: must be a list"),
        (["lora.ranks=[8,"], r"lora\.ranks: must be a list"),
        (["lora.alpha=-1"], r"lora\.alpha: must be a number > 0 or none, got '-1'"),
        (["data.columns=input"], r"data\.columns: must be a table such as instruction=question,output=answer"),
        (['data.columns={"a": '], r"data\.columns: must be a table"),
        (["model.target_modules=none"], r"must be all-linear or a list, each text, got 'none'"),
        (["seed=true"], r"seed: must be a whole number >= 0, got 'true'"),
        (["rounds.count=2.5"], r"rounds\.count: must be a whole number >= 1, got '2\.5'"),
        (["training.autocast=perhaps"], r"training\.autocast: must be true or false, got 'perhaps'"),
        (["wire.up=bf16"], r"one of float32, float16, bfloat16, int8, int4, got 'bf16'; did you mean bfloat16\?"),
        (
            ["method.name=florra"],
            r"method\.name: must be one of fed-sb, .*rolora, got 'florra'; did you mean flora",
        ),
        (["training=3"], r"training: is a section with the settings learning_rate, .*got '3'"),
        (["training.threads"], r"training\.threads: an override is written key=value"),
        (["training.local_steps=5", "training.local_epochs=1"], r"training\.local_steps: .*exactly one.*got 5 and 1"),
        (["training.local_steps=none"], r"training\.local_steps: .*exactly one.*got neither"),
        (["model.task_type=sequence-classification", "data.name=a.csv"], r"model\.labels: .*at least two.*got none"),
        (
            ["model.task_type=sequence-classification", "data.name=a.csv", "model.labels=a,a"],
            r"model\.labels: .*different label names in order, got a,a",
        ),
        (["model.task_type=sequence-classification", "model.labels=a,b"], r"model\.task_type: the embedded skills"),
        (["data.name=a.csv", "data.partition.kind=natural"], r"data\.partition\.key: a natural partition .*the owner"),
        (["data.name=a.csv", "data.partition.kind=dirichlet"], r"data\.partition\.key: a dirichlet .*the label"),
        (["data.name=a.csv", "data.partition.kind=skills"], r"data\.partition\.kind: deals the embedded skills only"),
        (["data.partition.kind=files"], r"data\.partition\.kind: files need a folder"),
        (["lora.rslora=true"], r"lora\.rslora: .*set lora\.alpha"),
        (
            ["method.name=fedit", "method.max_rank=3"],
            r"method\.max_rank: belongs to fedex-lora, flexlora, flora, frlora; the method is fedit and got 3",
        ),
        (["method.name=ffa-lora", "method.warm_start=true"], r"method\.warm_start: belongs to flora"),
        (["method.task_rank=3"], r"method\.task_rank: belongs to fed-sb, .*rolora; the method is flora"),
        (
            ["server.optimizer=adam"],
            r"server\.optimizer: adam goes with fed-sb, fedsa-lora, ffa-lora .*method is flora",
        ),
        (
            ["server.optimizer=momentum", "method.name=fedit"],
            r"server\.optimizer: momentum goes with fed-sb, fedsa-lora, ffa-lora, flora, frlora .*method is fedit",
        ),
        (["robust.rule=median"], r"robust\.rule: median goes with ffa-lora \(entries mean the same"),
        (["robust.rule=trimmed-mean", "method.name=fedsvd"], r"robust\.rule: trimmed-mean goes with ffa-lora"),
        (
            ["robust.rule=krum", "method.name=fedsa-lora"],
            r"robust\.rule: fedsa-lora's B stays with the clients.*got krum",
        ),
        (["robust.rule=fltrust"], r"robust\.trusted: names the client.*set both or neither, got rule fltrust"),
        (["robust.trusted=client-00001"], r"robust\.trusted: .*got rule none and trusted .*client-00001"),
        (
            ["robust.rule=krum", "rounds.clients=4"],
            r"robust\.rule: krum against a share of 0\.2 needs more than 4 clients",
        ),
        (["robust.rule=multi-krum", "rounds.sampling=poisson"], r"robust\.rule: multi-krum .*got 10 on average"),
        (
            ["robust.rule=fltrust", "robust.trusted=client-00000", "rounds.fraction=0.5"],
            r"robust\.rule: fltrust needs the trusted client in every round",
        ),
        (["attack.kind=scaling", "method.name=fedsa-lora"], r"attack\.kind: fedsa-lora's clients send A alone"),
        (["robust.rule=krum", "robust.bound=3"], r"robust\.bound: belongs to norm-bound and centred-clipping"),
        (["wire.top=4", "method.name=fedit"], r"wire\.top: flora and flexlora send products.*got 4"),
        (["wire.up=int8", "method.name=fedsvd"], r"wire\.up: int8 goes with fedex-lora, fedit.*fedsvd's factors"),
        (["wire.down=bfloat16", "method.name=fed-sb"], r"wire\.down: bfloat16 goes with .*use float32"),
        (
            ["personal.steps=3", "method.name=fedsa-lora"],
            r"personal\.steps: fedsa-lora's clients have personal adapters",
        ),
        (
            ["server.rate=0.5"],
            r"server\.rate: has no effect while server\.optimizer is none, got 0\.5: leave it out, or set "
            r"server\.optimizer to momentum or adam or yogi",
        ),
        (["server.beta1=0.5"], r"server\.beta1: has no effect while server\.optimizer is none, got 0\.5"),
        (["server.beta2=0.5"], r"server\.beta2: has no effect while .*or set server\.optimizer to adam or yogi"),
        (["server.tau=0.5", "server.optimizer=momentum"], r"server\.tau: .* server\.optimizer is momentum, got 0\.5"),
        (["personal.rank=2"], r"personal\.rank: has no effect while personal\.steps is 0, got 2: .*to 1 or more"),
        (["attack.strength=3"], r"attack\.strength: has no effect while attack\.kind is none, got 3"),
        (["attack.share=0.3"], r"attack\.share: has no effect while attack\.kind is none, got 0\.3"),
        (["robust.attackers=0.1"], r"robust\.attackers: has no effect while robust\.rule is none, got 0\.1"),
        (
            ["robust.attackers=0.1", "robust.rule=screen"],
            r"robust\.attackers: .*is screen.*to krum or multi-krum or median or trimmed-mean",
        ),
        (
            ["training.optimizer_state=keep", "method.name=rolora"],
            r"optimizer_state: rolora's clients begin each round with other factors",
        ),
    ],
)
def test_a_mistake_names_key_allowed_given_and_nearest(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(overrides=overrides)
    assert str(caught.value).startswith("1 mistake in the settings:\n")


@pytest.mark.parametrize(
    "overrides",
    [
        *(["server.optimizer=adam", "method.name=ffa-lora", f"server.{own}=0.5"] for own in ("rate", "beta2", "tau")),
        ["server.optimizer=momentum", "server.rate=0.5", "server.beta1=0.5"],
        ["server.rate=none", "server.beta1=0.9", "server.tau=1e-3", "robust.attackers=0.2", "attack.share=0.2"],
        ["personal.rank=2", "personal.steps=1"],
        *(
            ["method.name=ffa-lora", f"robust.rule={rule}", "robust.attackers=0.1"]
            for rule in ("krum", "multi-krum", "median", "trimmed-mean")
        ),
        *([f"attack.kind={k}", "attack.share=0.3", "attack.strength=2"] for k in ATTACKS),
    ],
    ids=" ".join,
)
def test_a_setting_that_is_read_or_at_its_default_is_taken(overrides: list[str]) -> None:
    load_config(overrides=overrides)


def test_which_ignored_setting_is_not_guessed_from_a_wrong_one() -> None:
    with pytest.raises(ConfigError, match=r"^1 mistake in the settings:\n  server\.optimizer: must be one of"):
        load_config(overrides=["server.optimizer=adm", "server.rate=0.5"])


@pytest.mark.parametrize("key", ["seed", "rounds.count", "training.learning_rate", "data.partition.kind"])
def test_true_is_not_one(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: must be .*, got true"):
        load_config(flower={key: True})


def test_none_is_written_where_the_default_is_another_value() -> None:
    written = tomllib.loads(to_toml(load_config(overrides=["training.clip_norm=none", "training.local_epochs=2"])))
    assert (written["training"]["clip_norm"], written["training"]["local_steps"]) == ("none", "none")
    assert "revision" not in written["model"]
    assert not [value for value in flat(RunConfig()).values() if value is None]


def test_all_mistakes_at_once_and_no_echo_of_them(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        "sead = 1\n[training]\nlearning_rate = -1\nlocal_steps = 0\n[model]\nlabels = [[]]\n[nothing]\n"
        "[lora]\nrslora = true"
    )
    with pytest.raises(ConfigError, match=r"^8 mistakes in the settings \(.*bad\.toml\):") as caught:
        load_config(path, ["model.task_type=sequence-classification", "method.name=x"])
    assert {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]} == {
        "sead",
        "nothing",
        "training.learning_rate",
        "training.local_steps",
        "model.labels",  # they are wrong; that they are too few is not said
        "method.name",
        "model.task_type",  # conflicts with the embedded data
        "lora.rslora",  # conflicts with no alpha
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed = 1\nname = \n", r"bad\.toml: not valid TOML: .*line 2"),
        (b"[model]\nname = 'a", r"bad\.toml: not valid TOML: .*line 2"),
        (b"seed = [1,\n", r"bad\.toml: not valid TOML: .*line 1"),
        (b"name = '\xff'", r"bad\.toml: a settings file is UTF-8, and byte 8 is not"),
        (b"seed = 2020-01-01", r"seed: must be a whole number >= 0, got \"2020-01-01\""),
    ],
)
def test_a_damaged_file_says_where(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read the settings: No such file"):
        load_config(tmp_path / "none.toml")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["seed=" + "9x" * 500])
    assert len(str(caught.value)) < 200


def test_differences_and_digest_see_the_same_changes() -> None:
    old, new = RunConfig(), load_config(overrides=["training.learning_rate=1e-2", "lora.ranks=8,4", "lora.alpha=16"])
    assert differences(old, new) == [
        "lora.ranks: 16,16,8,8,8,8,4,4,4,4 -> 8,4",
        "lora.alpha: none -> 16.0",
        "training.learning_rate: none -> 0.01",
    ]
    assert differences(old, RunConfig()) == []
    assert digest(old) == digest(RunConfig()) != digest(new)


def test_another_method_keeps_what_is_not_the_first_ones_own() -> None:
    flora = load_config(overrides=["method.max_rank=32", "seed=4"])
    fedit = with_method(flora, "fedit")
    assert differences(flora, fedit) == ["method.name: 'flora' -> 'fedit'", "method.max_rank: 32 -> none"]
    assert with_method(flora, "flora") == flora
    with pytest.raises(ConfigError, match=r"method\.name: must be one of .*did you mean fedit"):
        with_method(flora, "fedi")


def test_method_names_are_those_that_are_registered() -> None:
    assert sorted(METHOD_NAMES) == sorted(METHODS) == sorted(get_args(MethodName))


def test_training_settings_are_the_fields_of_local_training_and_threads() -> None:
    assert set(TrainingConfig.model_fields) == {f.name for f in dataclasses.fields(LocalTraining)} | {"threads"}
    defaults = {f.name: f.default for f in dataclasses.fields(LocalTraining) if f.default is not dataclasses.MISSING}
    plan = local_training(RunConfig())
    assert {name: getattr(plan, name) for name in defaults} == defaults
    assert local_training(with_method(RunConfig(), "ffa-lora")).learning_rate == pytest.approx(3e-2)
    assert local_training(RunConfig(), method="plain LoRA").learning_rate == 4e-3
    assert local_training(load_config(overrides=["model.name=other/model"])).learning_rate == 2e-4
    assert local_training(load_config(overrides=["training.learning_rate=1"]), method="ffa-lora").learning_rate == 1
    assert (plan.learning_rate, plan.local_steps, plan.local_epochs, plan.batch_size) == (1e-2, 15, None, 16)


@pytest.mark.filterwarnings("ignore:.*Click 9:DeprecationWarning")
def test_flower_knows_every_setting_at_its_default() -> None:
    """Read with Flower's own code: it refuses a `--run-config` key that is not in this table."""
    from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args, validate_config

    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    assert validate_config(project, check_module=False) == (True, [], [])
    table = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    expected = {**flat(RunConfig()), **FLOWER_ONLY}
    assert {k: (type(v), v) for k, v in table.items()} == {k: (type(v), v) for k, v in expected.items()}
    given = parse_config_args(['training.local_epochs=1 lora.ranks="8,4" method.max_rank="none" out="runs/a"'])
    config = load_config(flower=fuse_dicts(table, given))
    assert config == load_config(overrides=["training.local_epochs=1", "lora.ranks=8,4"])


def test_scenarios_load_and_the_default_one_is_the_default() -> None:
    found = {path.stem: load_config(path) for path in SCENARIOS.glob("*.toml")}
    assert found["default"] == RunConfig(name="default")
    assert found["own"].data.name != "skills"


CLASSIFIER = ("model.task_type=sequence-classification", "model.labels=x,y", "data.name=rows.jsonl")
FITTED = (*CLASSIFIER, "model.pooling=mean", "model.head=discriminants")
SUMMED = ("secure.on=true", "data.holdout=0", "method.name=ffa-lora")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["model.pooling=mean"], r"model\.pooling: has no effect while model\.task_type is causal-lm"),
        ([*CLASSIFIER, "model.head=discriminants"], r"model\.head: has no effect while model\.pooling is model"),
        (
            ["model.head=discriminants"],
            r"model\.head: has no effect while model\.task_type is causal-lm.*or set model\.task",
        ),
        ([*FITTED, "robust.rule=screen"], r"model\.head: one forged client could set the whole head"),
        ([*FITTED, "rounds.max_norm=1"], r"model\.head: one forged client .*, for no rule and no bound is applied"),
        ([*FITTED, "wire.down=int8"], r"model\.head: the fitted head would be rounded to int8"),
        (
            [*FITTED, 'tasks=[{"name": "a"}, {"name": "b"}]', "continual.method=nearest-mean"],
            r"model\.head: nearest-mean trains no head",
        ),
        ([*FITTED, *SUMMED], r"model\.head: goes with updates that are seen one by one; under secure\.on use random"),
    ],
)
def test_what_a_head_reads_and_how_it_begins_go_with_classifiers(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, sets)
    assert load_config(None, FITTED).model.head == "discriminants"
    assert load_config(None, [*CLASSIFIER, *SUMMED]).secure.on


CLIENT_LEVEL = ("method.name=ffa-lora", "privacy.level=client", "privacy.noise_multiplier=1")
TWO_TASKS = ('tasks=[{"name": "a"}, {"name": "b"}]', "continual.method=subspace", "continual.routing=false")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["privacy.noise_multiplier=none"], r"privacy\.epsilon: set exactly one of .*, got neither"),
        (["privacy.epsilon=8"], r"privacy\.epsilon: set exactly one of .*, got 1\.0 and 8"),
        (["privacy.scheme=fixed-size"], r"privacy\.scheme: .*: use poisson"),
        (["personal.steps=5"], r"personal\.steps: .*: leave it at 0"),
        (
            ["method.name=flora"],
            r"method\.name: whole clients are private in sums .*: use fed-sb, fedit, ffa-lora, rolora",
        ),
        (
            ["method.name=fedit", "lora.ranks=8,4"],
            r"lora\.ranks: fedit pads .*: give all one rank, or use fed-sb, ffa-",
        ),
        (["method.name=fed-sb"], r"method\.basis: fed-sb's first round takes the clients' factors .*: use random"),
        (
            ["rounds.fraction=0.5"],
            r"rounds\.sampling: epsilon is counted for clients that are drawn each .*: use poisson",
        ),
        (["robust.rule=median"], r"robust\.rule: what median keeps depends on all clients .*; use none"),
        (["privacy.noise=clients"], r"privacy\.noise: each client adds only its share, .*: set secure\.on=true, or"),
        (["privacy.rows=9"], r"privacy\.rows: has no effect while privacy\.level is client"),
        (["privacy.sampling=0.5"], r"privacy\.sampling: has no effect while privacy\.level is client"),
        ([*TWO_TASKS, "continual.routing=true"], r"continual\.routing: .*: set it to false"),
        ([*TWO_TASKS, "continual.effects=true"], r"continual\.effects: .*: set it to false"),
        ([*TWO_TASKS, "continual.method=input-aware"], r"continual\.method: input-aware: .*: use subspace, o-lora"),
        (
            [*TWO_TASKS, "continual.method=ewc", "method.name=fedit", "lora.ranks=8"],
            r"continual\.method: ewc: its Fisher information .*: use subspace",
        ),
        (
            ["secure.on=true", "method.name=flora", "secure.columns=8"],
            r"secure\.columns: a sketch is two sums, .*: use a method that is one sum, e\.g\. ffa-lora",
        ),
        (["secure.on=true", "secure.bound=50"], r"secure\.bound: has no effect where whole clients .*privacy\.clip is"),
        (["secure.on=true", "secure.examples=50"], r"secure\.examples: has no effect where whole clients are private"),
    ],
)
def test_what_client_level_privacy_cannot_go_with(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=[*CLIENT_LEVEL, *sets])


@pytest.mark.parametrize("key", ["noise=clients", "quantile=0.5"])
@pytest.mark.parametrize("level", ["none", "example"])
def test_what_only_client_level_reads(key: str, level: str) -> None:
    sets = ["privacy.noise_multiplier=1", "privacy.rows=99", "data.holdout=0"] if level == "example" else []
    with pytest.raises(ConfigError, match=f"has no effect while privacy.level is {level}"):
        load_config(overrides=[f"privacy.level={level}", *sets, f"privacy.{key}"])


@pytest.mark.parametrize(
    "sets",
    [
        ["method.name=fedit", "lora.ranks=8"],
        ["method.name=rolora"],
        ["method.name=fed-sb", "method.basis=random"],
        ["rounds.fraction=0.5", "rounds.sampling=poisson", "privacy.quantile=0.5"],
        ["training.local_epochs=1", "training.optimizer_state=keep", "wire.up=int8", "rounds.max_norm=3"],
        ["secure.on=true", "privacy.noise=clients", "privacy.quantile=0.5"],
        ["server.optimizer=momentum", "data.holdout=0.1"],
        list(TWO_TASKS),
        [*TWO_TASKS, "method.name=fedit", "lora.ranks=8", "continual.method=replay"],
    ],
)
def test_what_client_level_privacy_goes_with(sets: list[str]) -> None:
    assert load_config(overrides=[*CLIENT_LEVEL, *sets]).privacy.level == "client"
