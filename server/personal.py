"""The last round of a run with `personal.steps`: local adapters, which never travel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlora.config import RunConfig, local_training
from fedlora.errors import RoundFailed
from fedlora.rng import stream
from fedlora.state import Ask, GlobalState, Part, PersonalPair, TrainPlan
from server.asking import Courier, Notify, Tally, Turn
from server.evaluate import evaluation_ask, summary
from server.roster import Roster
from strategies.base import head_start

__all__ = ["personalised"]


def personalised(
    config: RunConfig, state: GlobalState, roster: Roster, courier: Courier, notify: Notify
) -> dict[str, Any]:
    """Every client trains a local adapter on the global one and keeps it; both are scored on its own rows.

    Returns the event for the run's log. Raises: RoundFailed if no client could train.
    """
    number, steps = config.rounds.count + 1, config.personal.steps
    plain = local_training(config, method="plain LoRA")
    training = replace(plain, local_steps=steps, local_epochs=None, optimizer_state="fresh")
    common = evaluation_ask(state)
    head: tuple[Part, ...] = ("head",) if state.layout.head else ()
    asks: dict[str, Ask] = {}
    own: dict[str, Ask] = {}
    for m in roster.members():
        rank = config.personal.rank or m.rank
        plan = TrainPlan(
            method="personal",
            rank=rank,
            rows=rank,
            scale=m.scale,
            train=("A", "B", *head),
            send=(),
            keep=("A", "B", *head),
            a_from="fresh",
            b_from="zero",
            training=training,
            seed=int(stream(config.seed, "personal", m.id).integers(2**53)),
        )
        pair = state.open_task.pair
        asks[m.id] = Ask(plan=plan, blocks=common.blocks, frozen=pair, arrays=head_start(state))
        own[m.id] = replace(common, personal=PersonalPair(rank=rank, scale=m.scale))
    tally = Tally()
    notify({"event": "personal", "clients": len(asks)})
    trained, told = courier.ask(Turn(kind="train", round=number), state, asks, roster, tally)
    trained.clear()
    if not told:
        why = "; ".join(str(r) for r in tally.refused[-3:])
        raise RoundFailed(f"no client could train a local adapter ({why}); the run's own adapter is in its checkpoint")
    scores: list[dict[str, dict[str, Any]]] = []
    for phase, each in enumerate((dict.fromkeys(own, common), own)):
        there = {c["id"]: each[c["id"]] for c in told}
        turn = Turn(kind="evaluate", round=number, phase=phase)
        spool, measured = courier.ask(turn, state, there, roster, tally)
        spool.clear()
        scores.append({c["id"]: summary(c["metrics"], groups=False) for c in measured})
    clients = [
        {
            **client,
            "global": scores[0].get(client["id"], {}),
            "personal": scores[1].get(client["id"], {}),
        }
        for client in told
    ]
    refused = [vars(r) for r in sorted(tally.refused, key=lambda r: r.client)]
    traffic = {"bytes_down": sum(tally.down.values()), "bytes_up": sum(tally.up.values())}
    return {"event": "personal", "steps": steps, "clients": clients, "refused": refused, **traffic}
