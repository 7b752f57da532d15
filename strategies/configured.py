"""The method of a run with everything that its settings wrap around it.

    inner method  <  secure sums, noise on whole clients, or a robust rule  <  server optimiser
                  <  publication in the codec of the way down

Each wrapper is a Method again, under the inner one's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedlora.config import MethodConfig, RunConfig
from fedlora.feedback import publish
from fedlora.privacy.clients import ClientPrivacy
from fedlora.state import Codec, GlobalState, Layout
from strategies.base import Closed, Cohort, Member, Method, Round, get
from strategies.private import private_clients
from strategies.robust import guarded
from strategies.secured import secured
from strategies.server_optimizer import optimised

__all__ = ["PUBLISHED", "configured", "published"]

PUBLISHED = "published"  # owner of the error of publication in GlobalState.memory
_STARTS = ("flora",)  # owners of pairs in the memory that a round starts from and takes off again


def configured(config: RunConfig, terms: ClientPrivacy | None = None) -> Method:
    """The method that the settings name, wrapped as they say; `terms` are those of the whole run at client level.

    Raises: MethodError as `strategies.base.get`.
    """
    method = get(config.method.name)
    if config.secure.on:
        equal = {"examples": 1} if config.privacy.level != "none" else {}  # under privacy nobody counts rows
        method = secured(method, config.secure.model_copy(update=equal), terms)
    elif terms is not None:
        method = private_clients(method, terms)
    if config.robust.rule != "none":
        method = guarded(method, config.robust)
    if config.server.optimizer != "none":
        method = optimised(method, config.server)
    return published(method, config.wire.down)


def published(method: Method, codec: Codec) -> Method:
    """The same method whose state, at the opening and after every round, is what the codec can say of it: clients,
    server and release have one model. What the codec leaves out is remembered in the state and added to what changes
    next (`fedlora.feedback.publish`). With float32 this is the method itself.
    """
    if codec == "float32":
        return method

    def rounded(before: GlobalState | None, after: GlobalState) -> GlobalState:
        error = {} if before is None else before.memory.get(PUBLISHED, {})
        state, error = publish(before, after, codec, error, starts=_STARTS)
        return replace(state, memory={**state.memory, PUBLISHED: error})

    def open_state(
        base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int
    ) -> GlobalState:
        return rounded(None, method.open(base, layout, members, settings, seed))

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        closed: Closed = yield from method.protocol(state, cohort)
        return replace(closed, state=rounded(state, closed.state))

    return replace(method, open=open_state, protocol=protocol)
