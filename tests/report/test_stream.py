"""What a run with tasks says of itself: from a synthetic log, whose scores are given."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedlora.config import flat, load_config, to_toml
from fedlora.report.html import write_report
from fedlora.report.log import RunLog
from fedlora.report.stream import Stream, stream_of, stream_table

Scores = Mapping[str, float]

FORGETS: dict[int, dict[str, float]] = {  # round in which a task was sealed -> scores of all tasks
    0: {"agnews": 0.26, "amazon": 0.21, "dbpedia": 0.08},
    4: {"agnews": 0.888, "amazon": 0.23, "dbpedia": 0.10},
    8: {"agnews": 0.786, "amazon": 0.472, "dbpedia": 0.09},
    12: {"agnews": 0.806, "amazon": 0.412, "dbpedia": 0.948},
}


def told(scores: Scores, counted: int = 500) -> dict[str, dict[str, float]]:
    return {name: {"score": s, "loss": 1.0 - s, "counted": float(counted)} for name, s in scores.items()}


def stream_events(
    matrix: Mapping[int, Scores],
    sealed: Mapping[int, Sequence[str]],
    trained: Mapping[int, Sequence[str]],
    *,
    tasks: Sequence[str],
    way: str = "sequential",
    judge: str = "server",
    clients: int = 4,
    inference: Mapping[str, Scores] | None = None,
    aggregate: Mapping[int, Mapping[str, float]] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[list[str], list[dict[str, Any]]]:
    """Overrides of the settings, and all events but the end. Row 0 of the matrix is the untrained model."""
    first = {name: min(r for r, names in trained.items() if name in names) for name in tasks if way != "joint"}
    counts = {name: max(r for r, names in sealed.items() if name in names) - first[name] + 1 for name in first}
    tables = [
        {"name": t, "data.name": f"{t}.csv", **({"start": first[t], "rounds.count": counts[t]} if t in first else {})}
        for t in tasks
    ]
    settings = [f"tasks={json.dumps(tables)}", f"continual.method={way}", f"rounds.clients={clients}", *overrides]
    config = load_config(overrides=settings)
    ids = [f"client-{i:05d}" for i in range(clients)]
    listed = [{"id": c, "rank": 4} for c in ids]
    events: list[dict[str, Any]] = [
        {"event": "start", "run": "r", "method": "fedit", "config": flat(config), "clients": listed}
    ]
    if 0 in matrix:
        events.append({"event": "untrained", "tasks": told(matrix[0])})
    began: dict[str, int] = {}
    for number, names in sorted(trained.items()):
        for name in names:
            began.setdefault(name, number)
        age = [number - began[name] + 1 for name in names]
        entries = [
            {
                "id": c,
                "task": name,
                "examples": 100,
                "loss_before": 2.0 - 0.2 * a,
                "loss_after": 1.8 - 0.2 * a,
                "bytes_up": 1000 if name == names[0] else 0,
                "bytes_down": 3000 if name == names[0] else 0,
            }
            for name, a in zip(names, age, strict=True)
            for c in ids
        ]
        score = sum(0.2 + 0.15 * a for a in age) / len(age)
        groups = {f"{name} {x}": {"correct": 10 * score, "counted": 20.0} for name in names for x in "ab"}
        found = {"score": score, "loss": 2 - score, "counted": 500.0, "groups": groups}
        event: dict[str, Any] = {
            "event": "round",
            "round": number,
            "tasks": list(names),
            "seconds": 2.0,
            "clients": entries,
            "aggregate": {"rank": 8.0, **(aggregate or {}).get(number, {})},
            "evaluation": {
                **found,
                "clients": {c: {"score": 0.5, "counted": 50.0} for c in ids},
                **({"server": found} if judge == "server" else {}),
            },
            "bytes_up": 1000 * clients,
            "bytes_down": 3000 * clients,
        }
        if number in sealed:
            both = {"own": {}, "server": {}, judge: told(matrix[number])}
            event["border"] = {"sealed": list(sealed[number]), **both}
            if inference and number == max(sealed):
                event["border"]["inference"] = {w: told(scores) for w, scores in inference.items()}
        events.append(event)
    return settings, events


def three_tasks(way: str = "sequential", upto: int = 12, **more: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """agnews, amazon and dbpedia, four rounds each, with the scores of `FORGETS`."""
    names = ["agnews", "amazon", "dbpedia"]
    settings, events = stream_events(
        FORGETS,
        {4: names[:1], 8: names[1:2], 12: names[2:]},
        {r: [names[(r - 1) // 4]] for r in range(1, 13)},
        tasks=names,
        way=way,
        inference={
            "summed": {"agnews": 0.806, "amazon": 0.412, "dbpedia": 0.948},
            "known": {"agnews": 0.888, "amazon": 0.472, "dbpedia": 0.948},
            "open": {"agnews": 0.71, "amazon": 0.33, "dbpedia": 0.92},
            "routed": {"agnews": 0.86, "amazon": 0.46, "dbpedia": 0.93},
            "routing": {"agnews": 0.97, "amazon": 0.98, "dbpedia": 0.99},
        },
        aggregate={
            4: {"sealed_error_relative": 0.0, "inputs_seen": 0.12},
            8: {
                "overlap": 0.21,
                "overlap_largest": 0.44,
                "overlap_product": 0.19,
                "overlap_random": 0.25,
                "sealed_error_relative": 0.0,
                "inputs_seen": 0.2,
            },
            12: {
                "overlap": 3.1e-8,
                "overlap_largest": 9e-8,
                "overlap_product": 2e-8,
                "overlap_random": 0.35,
                "sealed_error_relative": 0.031,
            },
        },
        **more,
    )
    return settings, [e for e in events if e.get("round", 0) <= upto]


def folder_of(
    folder: Path, made: tuple[list[str], list[dict[str, Any]]], *, end: bool = True, extra: Sequence[str] = ()
) -> Path:
    settings, events = made
    config = load_config(overrides=[*settings, *extra])
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    log = RunLog(folder)
    for event in [*events, *([{"event": "end", "seconds": 24.0}] if end else [])]:
        log.append(event)
    return folder


def stream(made: tuple[list[str], list[dict[str, Any]]]) -> Stream:
    found = stream_of(made[1])
    assert found is not None
    return found


AB = ("agnews", "amazon")
OVERLAPPING: dict[int, dict[str, float]] = {
    0: {"agnews": 0.2, "amazon": 0.2},
    5: {"agnews": 0.8, "amazon": 0.3},
    7: {"agnews": 0.7, "amazon": 0.5},
}


def overlapping() -> tuple[list[str], list[dict[str, Any]]]:
    """agnews in rounds 1 to 5, amazon in rounds 3 to 7."""
    trained = {r: [n for n, on in zip(AB, (r <= 5, r >= 3), strict=True) if on] for r in range(1, 8)}
    return stream_events(OVERLAPPING, {5: AB[:1], 7: AB[1:]}, trained, tasks=AB, way="subspace")


def joint(judge: str = "server") -> tuple[list[str], list[dict[str, Any]]]:
    scores = {0: {"agnews": 0.2, "amazon": 0.1}, 6: {"agnews": 0.8, "amazon": 0.5}}
    if judge == "own":
        scores = {6: {"all-tasks": 0.65}}
    trained = {r: ["all-tasks"] for r in range(1, 7)}
    return stream_events(scores, {6: ["all-tasks"]}, trained, tasks=AB, way="joint", judge=judge)


def test_a_run_without_tasks_has_no_stream() -> None:
    start = {"event": "start", "run": "r", "method": "flora", "config": flat(load_config(overrides=[])), "clients": []}
    for events in ([start], [start | {"config": {}}], []):
        assert stream_of(events) is None
        assert stream_table(events) == ""


def test_the_measures_are_those_of_the_matrix() -> None:
    found = stream(three_tasks()).measured()
    assert found is not None
    assert found.average_accuracy == pytest.approx((0.806 + 0.412 + 0.948) / 3)
    assert found.backward_transfer == pytest.approx(((0.806 - 0.888) + (0.412 - 0.472)) / 2)
    assert found.forgetting == pytest.approx(((0.888 - 0.806) + (0.472 - 0.412)) / 2)
    assert found.forward_transfer == pytest.approx(((0.23 - 0.21) + (0.09 - 0.08)) / 2)
    assert found.plasticity == pytest.approx((0.888 + 0.472 + 0.948) / 3)


def test_columns_are_in_the_order_of_sealing_whatever_the_settings_say() -> None:
    matrix = {2: {"b": 0.9, "a": 0.1, "c": 0.1}, 4: {"b": 0.8, "a": 0.7, "c": 0.1}}
    made = stream_events(
        matrix | {6: {"b": 0.8, "a": 0.7, "c": 0.6}},
        {2: ["b"], 4: ["a"], 6: ["c"]},
        {1: ["b"], 2: ["b"], 3: ["a"], 4: ["a"], 5: ["c"], 6: ["c"]},
        tasks=["a", "b", "c"],
    )
    assert stream(made).tasks == ("b", "a", "c")
    found = stream((made[0], [e for e in made[1] if e.get("round", 0) < 3])).tasks
    assert found == ("b", "a", "c")
    measured = stream(made).measured()
    assert measured is not None
    assert measured.backward_transfer == pytest.approx(-0.05)


@pytest.mark.parametrize(("drop", "marked"), [(0.05, False), (0.051, True), (-0.1, False)])
def test_more_than_five_points_below_the_best_is_forgotten(drop: float, marked: bool) -> None:
    made = stream_events(
        {1: {"agnews": 0.9, "amazon": 0.9}, 2: {"agnews": 0.9 - drop, "amazon": 0.2}},
        {1: AB[:1], 2: AB[1:]},
        {1: AB[:1], 2: AB[1:]},
        tasks=AB,
    )
    found = stream(made)
    assert found.forgotten("agnews", 1) is marked
    assert not found.forgotten("agnews", 0)
    assert not found.forgotten("amazon", 1)  # it had not been learnt when it scored 0.9
    assert [f.task for f in found.falls()] == (["agnews"] if marked else [])


def test_small_falls_add_up_to_a_forgotten_task() -> None:
    names = ("a", "b", "c")
    made = stream_events(
        {1: {"a": 0.90, "b": 0.1, "c": 0.1}, 2: {"a": 0.87, "b": 0.8, "c": 0.1}, 3: {"a": 0.83, "b": 0.8, "c": 0.8}},
        {i + 1: [n] for i, n in enumerate(names)},
        {i + 1: [n] for i, n in enumerate(names)},
        tasks=names,
    )
    [fall] = stream(made).falls()
    assert (fall.task, fall.best, fall.final, fall.rounds, fall.during) == ("a", 0.90, 0.83, (3, 3), ("c",))
    assert fall.largest == pytest.approx(0.04)
    assert not stream(made).forgotten("a", 1)
    assert stream(made).forgotten("a", 2)


def test_what_was_forgotten_is_said_with_when_and_by_what() -> None:
    text = stream_table(three_tasks()[1])
    assert (
        "- agnews stands at 80.6 %, 8.2 points below its best (88.8 % in round 4). Its largest fall at once, 10.2 "
        "points, came in rounds 5 to 8, while amazon was trained.\n" in text
    )
    assert text.index("- agnews") < text.index("- amazon stands at 41.2 %, 6.0 points below")
    assert "came in rounds 6 to 7, while amazon was trained" in stream_table(overlapping()[1])


def test_there_is_no_forward_transfer_to_a_task_that_has_begun() -> None:
    found = stream(overlapping())
    assert found.overlapping
    measured = found.measured()
    assert measured is not None
    assert measured.forward_transfer is None
    assert measured.backward_transfer == pytest.approx(-0.1)


def test_tasks_sealed_in_one_round_have_one_row() -> None:
    scores = {0: {"agnews": 0.2, "amazon": 0.2}, 2: {"agnews": 0.8, "amazon": 0.6}}
    found = stream(stream_events(scores, {2: AB}, {1: AB, 2: AB}, tasks=AB))
    assert [b.sealed for b in found.borders] == [AB]
    assert found.measured() is not None
    assert found.mean(0) == pytest.approx(0.7)


@pytest.mark.parametrize("judge", ["server", "own"])
def test_all_tasks_at_once_have_no_transfer(judge: str) -> None:
    found = stream(joint(judge))
    assert found.tasks == (AB if judge == "server" else ("all-tasks",))
    measured = found.measured()
    assert measured is not None
    assert measured.average_accuracy == measured.plasticity == pytest.approx(0.65)
    assert (measured.backward_transfer, measured.forgetting, measured.forward_transfer) == (None, None, None)


def test_one_task_has_no_transfer_either() -> None:
    made = stream_events({0: {"a": 0.1}, 2: {"a": 0.8}}, {2: ["a"]}, {1: ["a"], 2: ["a"]}, tasks=["a"])
    text = stream_table(made[1])
    assert [line.split("|")[2].strip() for line in text.splitlines() if "transfer" in line or "forgetting" in line] == [
        "n/a"
    ] * 3


def test_the_clients_speak_where_the_server_has_no_rows() -> None:
    matrix = {1: {"agnews": 0.9}, 2: {"agnews": 0.8, "amazon": 0.7}}
    made = stream_events(matrix, {1: AB[:1], 2: AB[1:]}, {1: AB[:1], 2: AB[1:]}, tasks=AB, judge="own")
    found = stream(made).measured()
    assert found is not None
    assert found.forgetting == pytest.approx(0.1)
    assert found.forward_transfer is None
    assert "on rows that clients held out" in stream_table(made[1])


def test_a_score_that_is_missing_leaves_the_measures_out() -> None:
    made = stream_events(
        {1: {"agnews": 0.9}, 2: {"amazon": 0.7}}, {1: AB[:1], 2: AB[1:]}, {1: AB[:1], 2: AB[1:]}, tasks=AB, judge="own"
    )
    assert stream(made).measured() is None
    assert "| average accuracy (AA)   |   n/a |" in stream_table(made[1])
    assert "| amazon, round 2 |      – | [70.0] |           – |" in stream_table(made[1])


def test_the_last_of_events_written_twice_counts() -> None:
    _, events = three_tasks()
    stale = json.loads(json.dumps(events[-1]))
    stale["border"]["server"]["agnews"]["score"] = 0.0
    again = [*events[:2], {"event": "untrained", "tasks": told({"agnews": 0.5})}, stale, *events[2:]]
    found = stream_of(again)
    assert found is not None
    assert found.untrained == {"agnews": 0.5}
    assert found.borders[-1].scores["agnews"] == 0.806


def test_the_inference_table_has_the_mean_of_each_way() -> None:
    table = stream_table(three_tasks()[1]).split("\n\n")[-1].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["which task is it?", "agnews", "amazon", "dbpedia", "mean"]
    assert ["task found", "86.0", "46.0", "93.0", "75.0"] in cells
    assert ["routing accuracy", "97.0", "98.0", "99.0", "98.0"] in cells
    assert len({len(line) for line in table}) == 1


def test_overlap_goes_to_the_task_that_it_was_measured_of() -> None:
    """Plain names are of the first of two tasks; the first task of a run has no overlap."""
    names = ("a", "b", "c", "d")
    scores = dict.fromkeys(names, 0.5)
    made = stream_events(
        {2: scores, 4: scores},
        {2: names[:2], 4: names[2:]},
        {1: names[:2], 2: names[:2], 3: names[2:], 4: names[2:]},
        tasks=names,
        way="subspace",
        aggregate={
            2: {"overlap": 0.2, "sealed_error_relative": 0.01, "b/sealed_error_relative": 0.02},
            4: {"overlap": 0.3, "d/overlap": 0.4, "sealed_error_relative": 0.03, "d/sealed_error_relative": 0.04},
        },
    )
    assert stream(made).sealing == {
        "a": {"sealed_error_relative": 0.01},
        "b": {"overlap": 0.2, "sealed_error_relative": 0.02},
        "c": {"overlap": 0.3, "sealed_error_relative": 0.03},
        "d": {"overlap": 0.4, "sealed_error_relative": 0.04},
    }


def page_of(folder: Path, made: tuple[list[str], list[dict[str, Any]]], *, end: bool = True) -> str:
    text = write_report(folder_of(folder, made, end=end)).read_text(encoding="utf-8")
    assert "<script" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for number in re.findall(
            r'\b(?:x|y|cx|cy)[12]?="([^"]+)"', ElementTree.tostring(ElementTree.fromstring(svg)).decode()
        ):
            assert -1 <= float(number) <= 480, svg
    return text.replace("\u00a0", " ")


def cells_of(text: str) -> list[list[tuple[str, str]]]:
    """Of the heat map, by row: class and what is said, with the change after it."""
    table = text.partition('<table class="heat tasks">')[2].partition("</table>")[0]
    rows = [re.findall(r'<td class="(\w*)"[^>]*>\s*(.*?)</td>', row, re.DOTALL) for row in table.split("<tr>")[2:]]
    return [[(css, re.sub(r"</?small>", " ", what).strip()) for css, what in row] for row in rows]


def test_the_page_shows_what_was_forgotten_and_by_what(tmp_path: Path) -> None:
    text = page_of(tmp_path, three_tasks())
    assert cells_of(text) == [
        [("ahead", "26.0"), ("ahead", "21.0"), ("ahead", "8.0"), ("sep", "")],
        [("own", "88.8"), ("ahead", "23.0"), ("ahead", "10.0"), ("sep", "88.8")],
        [("lost", "▼ 78.6 −10.2"), ("own", "47.2"), ("ahead", "9.0"), ("sep", "62.9")],
        [("lost", "▼ 80.6 +2.0"), ("lost", "▼ 41.2 −6.0"), ("own", "94.8"), ("sep", "72.2")],
    ]
    assert "agnews after amazon: 78.6 %, 10.2 points below its best so far" in text
    assert "Four clients taught one model three tasks, one after another: 72.2 % exact match on average, 7.1 " in text
    assert "A score on 500 rows has a standard error of up to 2.2 points." in text
    for said in ("Which task is it?", "3.1e-08", "−7.1 points", "+1.5 points", "Every round is scored on the tasks"):
        assert said in text
    assert text.count("<h2>Tasks</h2>") == 1
    assert "agnews 1.80 → 1.00, amazon 1.80 → 1.00" in text  # a client's loss, task by task


def test_a_client_with_two_tasks_in_a_round_took_part_once(tmp_path: Path) -> None:
    text = page_of(tmp_path, overlapping())
    table = text.partition("<h2>The clients</h2>")[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
    assert rows[1] == [
        "client-00000",
        "4",
        "200",
        "7",
        "agnews 1.80 → 0.800, amazon 1.80 → 0.800",
        "50 %",
        "7.0 kB",
        "21.0 kB",
    ]
    assert "two tasks, partly at the same time: 60.0 %" in text


def test_a_run_that_has_not_sealed_all_its_tasks(tmp_path: Path) -> None:
    text = page_of(tmp_path, three_tasks(upto=9), end=False)
    assert "are teaching one model three tasks, one after another: two sealed, 62.9 % exact match on average" in text
    assert "Round 9 of 12 has closed" in text
    assert len(cells_of(text)) == 3


def test_before_the_first_task_is_sealed(tmp_path: Path) -> None:
    text = page_of(tmp_path, three_tasks(upto=3), end=False)
    assert "<h2>Tasks</h2>" not in text
    assert "Four clients are teaching one model three tasks, one after another</h1>" in text
    assert "<h2>What was learnt</h2>" in text


def test_nothing_forgotten_is_said(tmp_path: Path) -> None:
    names = ("agnews", "amazon")
    scores = {1: {"agnews": 0.9, "amazon": 0.2}, 2: {"agnews": 0.9, "amazon": 0.8}}
    made = stream_events(scores, {1: names[:1], 2: names[1:]}, {1: names[:1], 2: names[1:]}, tasks=names)
    text = page_of(tmp_path, made)
    assert "85.0 % exact match on average, nothing forgotten" in text
    assert "No task fell by more than 5 points below its best." in text


def test_borders_that_nobody_scored_have_no_matrix(tmp_path: Path) -> None:
    made = stream_events({1: {}, 2: {}}, {1: AB[:1], 2: AB[1:]}, {1: AB[:1], 2: AB[1:]}, tasks=AB)
    text = page_of(tmp_path, made)
    assert "No row was scored when tasks were sealed." in text
    assert cells_of(text) == []


@pytest.mark.parametrize("clients", [4, 60])
def test_many_tasks_with_long_names_and_many_clients(tmp_path: Path, clients: int) -> None:
    names = [f"a-task-with-a-long-name-{i}" for i in range(15)]
    scores = {2 * i + 2: {n: 0.9 if j <= i else 0.1 for j, n in enumerate(names)} for i in range(15)}
    sealed = {2 * i + 2: [n] for i, n in enumerate(names)}
    made = stream_events(scores, sealed, {r: [names[(r - 1) // 2]] for r in range(1, 31)}, tasks=names, clients=clients)
    text = page_of(tmp_path, made)
    assert "; the first 12 tasks" in text
    assert ("loss after, a-task-with-a-long-name-14" in text) == (clients == 60)


def test_similarity_and_effect_are_shown_by_task(tmp_path: Path) -> None:
    aggregate = {
        8: {"overlap": 0.2, "effect_on_old": 0.75, "similarity/agnews": 0.125},
        12: {"overlap": 0.3, "effect_on_old": 0.5, "similarity/agnews": 0.0625, "similarity/amazon": 0.25},
    }
    sealed = {4: ["agnews"], 8: ["amazon"], 12: ["dbpedia"]}
    trained = {r: sealed[4 * ((r + 3) // 4)] for r in range(1, 13)}
    _, events = stream_events(FORGETS, sealed, trained, tasks=["agnews", "amazon", "dbpedia"], aggregate=aggregate)
    stream = stream_of(events)
    assert stream is not None
    assert stream.sealing["amazon"] == aggregate[8]
    assert stream.sealing["dbpedia"] == aggregate[12]


def similar(tmp_path: Path, tasks: int = 3) -> str:
    """A page whose tasks t0, t1, ... have similarities 0.01 (10 i + j), pairwise overlaps 0.5 + 0.01 (i + 10 j)."""
    names = [f"t{i}" for i in range(tasks)]
    aggregate = {
        i + 1: {
            "overlap": 3.1e-8 * i,
            "overlap_random": 0.25,
            **{f"overlap/t{j}": 0.5 + 0.01 * i + 0.1 * j for j in range(i)},
            **{f"similarity/t{j}": 0.1 * i + 0.01 * j for j in range(i)},
        }
        for i in range(1, tasks)
    }
    scores = {i + 1: dict.fromkeys(names, 0.5) for i in range(tasks)}
    legs = {i + 1: [name] for i, name in enumerate(names)}
    return page_of(tmp_path, stream_events(scores, legs, legs, tasks=names, aggregate=aggregate))


def test_similarity_and_overlap_are_heat_maps_with_their_numbers(tmp_path: Path) -> None:
    text = similar(tmp_path).partition("<h2>Overlap of the tasks</h2>")[2].partition("<h2>")[0]
    phi, rows, overlap = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert "Similarity φ" in phi
    assert "0 none, 1 all" in phi
    found = re.findall(r"<title>([^<]*)</title><rect class=\"cell\" style=\"--v:([\d.]+)%\".*?>([^<>]+)</text>", phi)
    assert found == [
        ("t1, t0: 0.100", "10.0", "0.10"),
        ("t2, t0: 0.200", "20.0", "0.20"),
        ("t2, t1: 0.210", "21.0", "0.21"),
    ]
    assert "Overlap of A with each earlier task" in rows
    assert re.findall(r"<title>([^<]*)</title><rect", rows) == ["t1, t0: 0.510", "t2, t0: 0.520", "t2, t1: 0.620"]
    assert re.findall(r"--v:([\d.]+)%", overlap) == ["0.0", "25.0", "0.0", "25.0"]
    assert ">3e-08</text>" in overlap
    assert "A, mean" in overlap
    assert "BA, mean" not in overlap
    assert "<table" not in text  # nothing is left to say


def test_a_broad_heat_map_has_the_whole_width(tmp_path: Path) -> None:
    assert 'class="broad"' in similar(tmp_path, 9)


def test_a_mixture_is_a_way_of_inference_in_plain_words(tmp_path: Path) -> None:
    names = ("a", "b")
    scores = {1: dict.fromkeys(names, 0.5), 2: dict.fromkeys(names, 0.5)}
    legs = {1: ["a"], 2: ["b"]}
    made = stream_events(scores, legs, legs, tasks=names, inference={"mixed": {"a": 0.875, "b": 0.5}})
    assert "| tasks mixed" in stream_table(made[1])
    text = page_of(tmp_path, made)
    assert "tasks mixed" in text
    assert "68.8 %" in text


def test_pairs_of_tasks_sealed_in_one_round_belong_to_the_later() -> None:
    """`overlap/c` of a round that sealed c and d has no second of its name, so it is plain; it is of d all the same."""
    names = ("a", "b", "c", "d")
    scores = dict.fromkeys(names, 0.5)
    made = stream_events(
        {2: scores, 4: scores},
        {2: names[:2], 4: names[2:]},
        {1: names[:2], 2: names[:2], 3: names[2:], 4: names[2:]},
        tasks=names,
        way="incremental",
        aggregate={
            2: {"overlap": 0.2, "overlap/a": 0.21, "similarity/a": 0.22},
            4: {
                **{"overlap": 0.3, "overlap/a": 0.31, "overlap/b": 0.32, "similarity/a": 0.33},
                **{"d/overlap": 0.4, "d/overlap/a": 0.41, "d/overlap/b": 0.42, "d/similarity/a": 0.43},
                **{"overlap/c": 0.44, "similarity/c": 0.45},
            },
        },
    )
    assert stream(made).sealing == {
        "a": {},
        "b": {"overlap": 0.2, "overlap/a": 0.21, "similarity/a": 0.22},
        "c": {"overlap": 0.3, "overlap/a": 0.31, "overlap/b": 0.32, "similarity/a": 0.33},
        "d": {
            **{"overlap": 0.4, "overlap/a": 0.41, "overlap/b": 0.42, "similarity/a": 0.43},
            **{"overlap/c": 0.44, "similarity/c": 0.45},
        },
    }


def sealing_of(text: str) -> list[list[str]]:
    """The rows of the table of sealed tasks, its heads first."""
    for table in re.findall(r"<table>.*?</table>", text, re.DOTALL):
        rows = [
            re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        ]
        if rows[0][0] == "sealed task":
            return rows
    return []


def pressed(
    penalties: Mapping[int, Sequence[float | None]], way: str = "o-lora", told: bool = True, **aggregate: Any
) -> tuple[list[str], list[dict[str, Any]]]:
    """agnews, amazon and dbpedia, two rounds each, with what two clients of 100 and 300 rows say of the penalty."""
    names = ["agnews", "amazon", "dbpedia"]
    scores = {r: dict.fromkeys(names, 0.5) for r in (2, 4, 6)}
    made = stream_events(
        scores,
        {2: names[:1], 4: names[1:2], 6: names[2:]},
        {r: [names[(r - 1) // 2]] for r in range(1, 7)},
        tasks=names,
        way=way,
        clients=2,
        overrides=["method.name=fedit"],
        **aggregate,
    )
    for event in made[1]:
        for i, client in enumerate(event["clients"] if event["event"] == "round" else ()):
            value = penalties.get(event["round"], (None, None))[i]
            client |= {"examples": (100, 300)[i]} | ({"grad_norm": 1.0} if told else {})
            client |= {} if value is None else {"anchor_penalty" if way == "ewc" else "overlap_penalty": value}
    return made


def test_the_penalty_is_shown_in_its_first_and_last_round(tmp_path: Path) -> None:
    made = pressed({3: (0.8, 0.4), 4: (0.4, 0.2), 5: (2.0, None), 6: (1.0, 1.0)})
    text = page_of(tmp_path, made)
    assert sealing_of(text) == [
        ["sealed task", "penalty, first round", "penalty, last round", "rounds without it"],
        ["agnews", "0", "0", "all: nothing was sealed before it"],
        ["amazon", "0.500", "0.250", ""],
        ["dbpedia", "2.00", "1.00", ""],
    ]
    assert "Penalty: what the overlap of A with earlier tasks" in text
    assert "<h2>What each task was under</h2>" in text  # there is no overlap to show
    assert "No overlap does not mean" not in text


def test_a_task_in_which_a_stood_still_had_no_penalty(tmp_path: Path) -> None:
    """rolora, whose rounds train B and A in turn; the last task B alone."""
    rows = sealing_of(page_of(tmp_path, pressed({4: (0.8, 0.4)})))
    assert rows[2] == ["amazon", "0.500", "0.500", "1 of 2: no A was trained"]
    assert rows[3] == ["dbpedia", "0", "0", "all: no A was trained"]


def test_tasks_that_overlap_are_free_until_one_is_sealed(tmp_path: Path) -> None:
    trained = {r: [n for n, on in zip(AB, (r <= 5, r >= 3), strict=True) if on] for r in range(1, 8)}
    made = stream_events(OVERLAPPING, {5: AB[:1], 7: AB[1:]}, trained, tasks=AB, way="o-lora")
    for event in made[1]:
        for client in event["clients"] if event.get("round", 0) > 5 else ():
            client["overlap_penalty"] = 0.25
    assert sealing_of(page_of(tmp_path, made))[1:] == [
        ["agnews", "0", "0", "all: nothing was sealed before it"],
        ["amazon", "0.250", "0.250", "3 of 5: nothing was sealed before it"],
    ]


def test_clients_that_tell_nothing_are_not_taken_to_have_no_penalty(tmp_path: Path) -> None:
    rows = sealing_of(page_of(tmp_path, pressed({}, told=False)))
    assert rows[1][1:] == ["0", "0", "all: nothing was sealed before it"]
    assert rows[2][1:] == ["–", "–", "all: clients did not tell"]


def test_ewc_shows_its_penalty_and_other_ways_none(tmp_path: Path) -> None:
    rows = sealing_of(page_of(tmp_path, pressed({3: (0.8, 0.4), 4: (0.4, 0.2)}, "ewc")))
    assert rows[2] == ["amazon", "0.500", "0.250", ""]
    assert rows[3][3] == "all: clients did not tell"  # A and B are held: a frozen A is no reason
    assert stream(pressed({3: (0.8, 0.4)}, "incremental")).penalties == {}


def note_of(text: str) -> str:
    return "".join(re.findall(r'<p class="note">(– means.*?)</p>', text))


def test_effects_that_were_not_measured_say_why(tmp_path: Path) -> None:
    seen = {2: {"inputs_seen": 0.9}, 4: {"inputs_seen": 0.9, "effect_on_old": 0.5}}
    default = page_of(tmp_path, pressed({}, "input-aware", aggregate=seen))
    assert [row[1] for row in sealing_of(default)] == ["effect on old inputs", "–", "0.500", "–"]
    assert note_of(default) == (
        "– means not measured. Nothing was sealed before agnews. By default only input-aware tasks that another one "
        "follows are measured; continual.effects = true measures all."
    )


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("replay", "Under replay one pair goes on from task to task: none has an update of its own."),
        ("incremental", "A task in which nothing was trained has no update."),
    ],
)
def test_ways_without_an_update_of_one_task_say_so(tmp_path: Path, way: str, why: str) -> None:
    seen = {r: {"inputs_seen": 0.9} for r in (2, 4, 6)}
    text = page_of(tmp_path, pressed({}, way, aggregate=seen))
    assert [row[1] for row in sealing_of(text)[1:]] == ["–"] * 3
    assert note_of(text) == f"– means not measured. Nothing was sealed before agnews. {why}"


def test_without_a_dash_nothing_is_said_of_one(tmp_path: Path) -> None:
    seen = {r: {"inputs_seen": 0.9, "effect_on_old": 0.5} for r in (4, 6)}
    settings, events = pressed({}, "incremental", aggregate=seen)
    assert note_of(page_of(tmp_path, (settings, events))) == "– means not measured. Nothing was sealed before agnews."
    plain = page_of(tmp_path, pressed({3: (0.8, 0.4)}))
    assert note_of(plain) == ""


def test_clients_without_rows_weigh_alike_where_none_has_any() -> None:
    made = pressed({3: (0.8, 0.4)})
    [event] = [e for e in made[1] if e.get("round") == 3]
    for client in event["clients"]:
        client["examples"] = 0
    assert stream(made).penalties["amazon"][3] == pytest.approx(0.6)


def test_all_tasks_at_once_have_no_effect_to_speak_of(tmp_path: Path) -> None:
    settings, events = joint()
    events = [{k: v for k, v in event.items() if k != "evaluation"} for event in events]
    events[-1]["aggregate"] |= {"inputs_seen": 0.9}
    text = page_of(tmp_path, (settings, events))
    assert sealing_of(text)[0] == ["sealed task", "inputs seen"]
    assert note_of(text) == ""
