"""The report: one file, nothing from outside, nothing unescaped, and sensible on runs of every kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedlora.config import RunConfig, flat, load_config, to_toml
from fedlora.errors import CheckpointError, ConfigError
from fedlora.report.compare import ComparisonRow, comparison_markdown, write_comparison
from fedlora.report.html import write_report
from fedlora.report.log import RunLog

EVIL = "<script>alert('x')</script>&\"]]>"
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Tags in balance, and everything that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.check(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.check(attrs)

    def check(self, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "xlink:href")]
        self.outside += [f"{k}={v}" for k, v in attrs if k.startswith("on") or "url(" in (v or "")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
        else:
            assert "@import" not in data
            assert "url(" not in data


def run_folder(
    folder: Path,
    overrides: list[str] | None = None,
    *,
    rounds: int = 3,
    cohort: int | None = None,
    evaluate: bool = True,
    references: bool = True,
    end: bool = True,
    groups: int = 12,
    odd: str = "",
    aggregate: dict[str, float] | None = None,
    detail: dict[str, float] | None = None,
) -> Path:
    config = load_config(overrides=overrides or [])
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    log = RunLog(folder)
    ids = [f"client-{i:05d}{odd}" for i in range(config.rounds.clients)]
    clients = [
        {"id": c, "rank": config.rank_of(i), "examples": 300, "groups": {f"g{odd}": 9}} for i, c in enumerate(ids)
    ]
    log.append({"event": "start", "run": f"r{odd}", "method": "flora", "config": flat(config), "clients": clients})
    for number in range(1, rounds + 1):
        share = number / rounds
        told = [
            {"id": c, "loss_before": 3.0 - share, "loss_after": 2.5 - share, "bytes_up": 1000, "bytes_down": 2000}
            for c in ids[: cohort or len(ids)]
        ]
        event: dict[str, Any] = {
            "event": "round",
            "round": number,
            "seconds": 2.0,
            "clients": told,
            "aggregate": {"rank": 4.0 * number, "truncation_error": 0.0, "truncation_error_relative": 0.01 * number},
            "bytes_up": 1000 * len(told),
            "bytes_down": 2000 * len(told),
            "refused": [{"client": ids[0], "rule": f"shape{odd}", "detail": f"detail{odd}"}] if odd else [],
            "missing": [ids[1]] if odd else [],
        }
        if aggregate is not None:
            event["aggregate"] = aggregate
        if evaluate:
            by_group = {f"skill {g}{odd}": {"correct": 8 * share, "counted": 10} for g in range(groups)}
            event["evaluation"] = {"score": 0.8 * share, "loss": 2 - share, "groups": by_group}
            event["evaluation"]["clients"] = {c: {"score": 0.5 * share} for c in ids[: cohort or len(ids)]}
            event["evaluation"]["server"] = {"score": 0.7 * share, "loss": 2.1 - share, "groups": by_group}
        log.append(event)
    if references:
        for name, score in (("bare base", 0.03), ("local only", 0.24), ("centralised", 0.86)):
            reference = {"event": "reference", "name": name, "score": score, "loss": 1.0}
            log.append(reference | ({"detail": detail} if detail and name == "local only" else {}))
    if end:
        log.append({"event": "end", "seconds": 61.0, "peak_memory_mib": 800.0})
    return folder


def page(folder: Path) -> tuple[Page, str]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    read = Page(text)
    assert read.outside == []
    assert not re.search(r"(?:src|href)\s*=|https?://", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        drawn = ElementTree.fromstring(svg)
        assert drawn.find("title") is not None
        for number in re.findall(r'\b(?:x|y|cx|cy|height|width)[12]?="([^"]+)"', svg):
            assert -1 <= float(number) <= 480, svg
    return read, text


def test_a_whole_run_says_its_result(tmp_path: Path) -> None:
    read, text = page(run_folder(tmp_path))
    said = read.text.replace("\u00a0", " ")
    assert "Ten clients taught one model: 3 % → 70 % exact match on twelve skills, of which no client holds" in said
    assert "more than four" in said
    assert "a client that learns alone reaches 24 %, and training on all the data in one place reaches 86 %" in said
    for what in ("+46.0", "−16.0", "70.0 %", "1 min 1 s", "4 to 16", "skill 11", "client-00009", "Truncation error"):
        assert what in said
    assert "90.0 kB" in said  # 3 rounds of 10 clients, 1 kB up and 2 kB down
    assert text.count("<svg") == 6 + 10  # charts, and a course for each client
    assert "script" not in read.tags


@pytest.mark.parametrize(
    ("aggregate", "said"),
    [
        ({"rank": 4.0}, "The rank of what the adapter adds to the base."),
        (
            {"rank": 4.0, "truncation_error_relative": 0.0},
            "The rank of what the adapter adds to the base: every round was merged without loss.",
        ),
        (
            {"rank": 4.0, "truncation_error_relative": 0.1},
            "The rank of what the adapter adds to the base, and what combining the clients' factors costs.",
        ),
        (
            {"rank": 4.0, "aggregation_error": 0.1},
            "The rank of what the adapter adds to the base, and what combining the clients' factors costs.",
        ),
        ({"aggregation_error": 0.1}, "What combining the clients' factors costs."),
        ({}, None),
    ],
)
def test_the_words_about_the_server_fit_its_charts(
    tmp_path: Path, aggregate: dict[str, float], said: str | None
) -> None:
    read, _ = page(run_folder(tmp_path, aggregate=aggregate))
    if said is None:
        assert "What the server keeps" not in read.text
    else:
        assert f"What the server keeps\n{said}\n" in read.text


@pytest.mark.parametrize(("overrides", "noun"), [([], "skills"), (["data.name=a.csv"], "groups")])
def test_what_a_client_alone_knows_and_does_not(tmp_path: Path, overrides: list[str], noun: str) -> None:
    detail = {"score on groups held": 0.97, "score on groups not held": 0.0}
    read, _ = page(run_folder(tmp_path, overrides, detail=detail))
    said = read.text.replace("\u00a0", " ")
    assert f"Alone, a client scores 97 % on the {noun} it holds and 0 % on those it does not. No row left" in said
    assert "Alone, a client" not in page(run_folder(tmp_path, overrides, detail={"score on groups held": 0.97}))[0].text


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"report\.html: cannot write the page: .*; free some space or allow"):
        write_report(run_folder(tmp_path))
    with pytest.raises(CheckpointError, match=r"comparison\.html: cannot write the page: No such file"):
        write_comparison(tmp_path / "nowhere", ROWS)


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    read, text = page(run_folder(tmp_path, [f"name={EVIL}"], odd=EVIL))
    assert "<script" not in text
    assert "script" not in read.tags
    assert f"detail{EVIL}" in read.text
    assert "Asked and never answered: 1 in round 1" in read.text


def test_one_round(tmp_path: Path) -> None:
    read, _ = page(run_folder(tmp_path, ["rounds.count=1"], rounds=1))
    assert "Score" in read.text


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    read, _ = page(run_folder(tmp_path, end=False, references=False))
    assert "Ten clients are teaching one model" in read.text
    assert f"Round 3 of {RunConfig().rounds.count} has closed" in read.text
    assert "For comparison" not in read.text


@pytest.mark.parametrize("started", [True, False])
def test_before_the_first_round(tmp_path: Path, started: bool) -> None:
    run_folder(tmp_path, rounds=0, end=False, references=False)
    if not started:
        (tmp_path / "metrics.jsonl").write_bytes(b"")
    read, _ = page(tmp_path)
    assert "No round has closed yet" in read.text


def test_without_an_evaluation_the_training_loss_speaks(tmp_path: Path) -> None:
    read, _ = page(run_folder(tmp_path, evaluate=False, references=False))
    assert "training loss 2.17 → 1.50" in read.text
    assert "exact match" not in read.text
    assert "By skill" not in read.text


def test_classification_counts_right_labels(tmp_path: Path) -> None:
    own = ["data.name=a.csv", "model.task_type=sequence-classification", "model.labels=a,b", "model.name=org/base"]
    read, _ = page(run_folder(tmp_path, own))
    assert "right labels on test rows of the server" in read.text.replace("\u00a0", " ")
    assert "AutoModelForSequenceClassification.from_pretrained('org/base', num_labels=2)" in read.text


def test_a_head_that_reads_means_and_begins_from_sums_is_told(tmp_path: Path) -> None:
    own = ["data.name=a.csv", "model.task_type=sequence-classification", "model.labels=a,b", "model.name=org/base"]
    (tmp_path / "means").mkdir()
    (tmp_path / "plain").mkdir()
    read, _ = page(run_folder(tmp_path / "means", [*own, "model.pooling=mean", "model.head=discriminants"]))
    plain, _ = page(run_folder(tmp_path / "plain", own))
    assert "Its head reads the mean of the last hidden states" in read.text
    assert "of adapter factors and sums over rows did." in read.text
    assert "Its head reads" not in plain.text
    assert "of adapter factors did." in plain.text


def test_a_thousand_clients_get_a_summary_and_the_extremes(tmp_path: Path) -> None:
    read, text = page(run_folder(tmp_path, ["rounds.clients=1000"], cohort=50))
    assert "1,000 clients, of which 50 took part" in read.text
    assert "median" in read.text
    assert "client-00000" in read.text
    assert "client-00999" in read.text
    assert "client-00500" not in read.text
    assert text.count("<tr>") < 80
    assert len(text) < 150_000


def with_personal(folder: Path, scores: Sequence[tuple[float, float | None, float | None]], **more: Any) -> Path:
    """A `personal` event with these (held-out rows, global, personal) by client; None: it did not answer."""
    clients = []
    for i, (counted, before, after) in enumerate(scores):
        both = {"global": before, "personal": after}
        told = {k: {"counted": counted, "score": s} if counted else {"counted": 0.0} for k, s in both.items() if s}
        clients.append({"id": f"client-{i:05d}", "loss_before": 2.0, "global": {}, "personal": {}, **told})
    RunLog(folder).append(
        {"event": "personal", "steps": 20, "clients": clients[::-1], "bytes_up": 3456, "bytes_down": 1200000, **more}
    )
    return folder


def table_rows(text: str, heading: str = "Personal adapters") -> list[list[str]]:
    """The rows of a section's tables, cell by cell."""
    section = text.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", section, re.DOTALL)]


def test_personal_adapters_against_the_global_one(tmp_path: Path) -> None:
    run_folder(tmp_path, ["personal.steps=20", "rounds.clients=4"])
    refusal = {"client": "client-00003", "rule": "timeout", "detail": "no answer"}
    scores = [(30.0, 0.1, 0.5), (10.0, 0.5, 0.1), (20.0, 0.6, None), (0.0, 1.0, 1.0)]
    read, text = page(with_personal(tmp_path, scores, refused=[refusal]))
    assert (
        "After the last round four clients trained a local adapter on top of the global one, 20 steps each" in read.text
    )
    assert "and kept it. With its evaluations this took 3.5 kB up and 1.2 MB down." in read.text
    assert "exact match on the rows that each client holds out" in read.text
    assert table_rows(text) == [
        ["client", "rows", "global", "personal"],
        ["client-00000", "30", "10.0 %", "50.0 %"],
        ["client-00001", "10", "50.0 %", "10.0 %"],
        ["client-00002", "20", "60.0 %", "–"],
        ["client-00003", "0", "–", "–"],
        ["mean", "40", "20.0 %", "40.0 %"],  # (30 * 0.1 + 10 * 0.5) / 40, (30 * 0.5 + 10 * 0.1) / 40
    ]
    assert "One answer refused by name" in read.text
    assert ["personal", "client-00003", "timeout", "no answer"] in table_rows(text, "Answers that were not taken")


def test_of_many_personal_adapters_the_extremes(tmp_path: Path) -> None:
    run_folder(tmp_path, ["personal.steps=20", "rounds.clients=100"], cohort=5)
    _, text = page(with_personal(tmp_path, [(10.0, 0.5, (i * 37 % 100 + 1) / 101) for i in range(100)]))
    gains = sorted((i * 37 % 100, f"client-{i:05d}") for i in range(100))
    rows = [row for row in table_rows(text) if row[0] != "client"]
    assert rows[0] == ["mean", "1,000", "50.0 %", "50.0 %"]
    assert [row[0] for row in rows[1:]] == [c for _, c in [*gains[:5], *gains[:-6:-1]]]


def test_personal_adapters_without_held_out_rows_are_told_and_not_scored(tmp_path: Path) -> None:
    run_folder(tmp_path, ["personal.steps=20", "rounds.clients=2", "data.holdout=0"], evaluate=False)
    read, text = page(with_personal(tmp_path, [(0.0, 1.0, 1.0)] * 2))
    assert "No client has both scores on rows that it holds out." in read.text
    assert table_rows(text) == []


def test_without_personal_adapters_there_is_no_such_section(tmp_path: Path) -> None:
    assert "ersonal" not in page(run_folder(tmp_path))[0].text.partition("All settings, as config.toml")[0]


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"unit": "example"}, ("What a row may have told", "each adds the noise itself", "of a training row")),
        (
            {"unit": "client", "noise_by": "server", "sampling": 0.5},
            ("What a client may have told", "the server adds", "Who was drawn is not told", "of a whole client"),
        ),
        (
            {"unit": "client", "noise_by": "clients", "sampling": 1.0},
            ("What a client may have told", "each adds its share", "of a whole client"),
        ),
    ],
)
def test_whose_privacy_it_is_and_who_adds_the_noise(
    tmp_path: Path, terms: dict[str, Any], said: tuple[str, ...]
) -> None:
    folder, log = tmp_path / "run", RunLog(tmp_path / "run")
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(load_config(None, ["rounds.count=1"])))
    log.append({"event": "start", "run": "r", "method": "ffa-lora", "config": flat(load_config()), "clients": []})
    spent = {"relation": "add-or-remove-one", "epsilon": 2.5, "delta": 1e-5, "clip": 1.0, "steps": 1, **terms}
    log.append({"event": "round", "round": 1, "privacy": spent, "evaluation": {"server": {"score": 0.5}}})
    _, text = page(folder)
    assert all(words in text for words in said)
    assert ("Who was drawn" in text) == (terms.get("sampling") == 0.5)


def test_many_rounds_and_many_groups_are_thinned_out(tmp_path: Path) -> None:
    read, _ = page(run_folder(tmp_path, ["rounds.count=200"], rounds=200, groups=100))
    assert "Of 100 groups, the 20 best and the 20 worst" in read.text
    assert read.tags.count("rect") == 400


def test_the_old_page_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    run_folder(tmp_path)
    write_report(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(b"damage\n")
    with pytest.raises(CheckpointError, match=r"line 1: damaged"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not list(tmp_path.glob("*.new"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is this the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config\.toml: cannot read the settings"):
        write_report(tmp_path)


ROWS = [
    ComparisonRow(method="local only", seeds=3, score=0.24, score_sd=0.02, loss=1.9, seconds=33.0),
    ComparisonRow(
        method="flora",
        seeds=3,
        score=0.8449,
        score_sd=0.012,
        own=0.881,
        loss=0.31,
        bytes_up=23.2e6,
        bytes_down=151e6,
        seconds=65.0,
    ),
    ComparisonRow(method="fedit|x", seeds=3),
]


def test_comparison_in_markdown() -> None:
    lines = comparison_markdown(ROWS).splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")] == [
        "method",
        "score",
        "own rows",
        "loss",
        "bytes up",
        "bytes down",
        "time",
    ]
    assert [c.strip() for c in lines[3].strip("|").split("|")] == [
        "flora",
        "84.5 ± 1.2 %",
        "88.1 %",
        "0.310",
        "23.2 MB",
        "151 MB",
        "1 min 5 s",
    ]
    assert "fedit\\|x" in lines[4]
    assert len({len(line) for line in lines}) == 1


def test_comparison_as_a_page(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, [*ROWS, ComparisonRow(method=EVIL, seeds=3)])
    assert path.name == "comparison.html"
    text = path.read_text(encoding="utf-8")
    read = Page(text)
    assert read.outside == []
    assert "<script" not in text
    assert EVIL in read.text
    assert "over 3 seeds" in read.text
    assert text.count('class="aside"') == 3


def test_a_curve_is_drawn_where_codecs_are_compared(tmp_path: Path) -> None:
    rows = [
        ComparisonRow(method="flora", codec=codec, seeds=2, score=score, bytes_up=size, bytes_down=2 * size)
        for codec, score, size in (("float32", 0.9, 4e6), ("int8", 0.89, 1e6), ("int4", 0.8, 5e5))
    ]
    text = write_comparison(tmp_path, [*ROWS, *rows]).read_text(encoding="utf-8")
    [svg] = re.findall(r"<svg class=\"chart\".*?</svg>", text)
    points = ElementTree.fromstring(svg).find("polyline").attrib["points"].split()  # type: ignore[union-attr]
    xs, ys = zip(*[tuple(map(float, p.split(","))) for p in points], strict=True)
    assert list(xs) == sorted(xs)  # more bytes to the right
    assert list(ys) == sorted(ys, reverse=True)  # a higher score upwards
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[1]) / 2, rel=0.01)  # logarithmic: 2 times, then 4 times
    assert "flora int8" in text
    assert "<svg" not in write_comparison(tmp_path, [*ROWS, rows[0]]).read_text(encoding="utf-8")
