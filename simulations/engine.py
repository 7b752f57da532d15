"""The engine of `fedlora simulate`: a Flower Grid in this process, with one resident base.

The same ServerApp and ClientApp as in a deployment, without Ray, sockets or processes: a message is answered when it
is pulled, so one client's adapter is in memory at a time.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Scalar = bool | int | float | str


class LocalGrid(Grid):
    """`clients` nodes in this process; node ids are 1000, 1001, ... in partition order.

    `memory` is the folder under which each client keeps what it must remember; None keeps nothing.
    """

    def __init__(
        self,
        app: Callable[[Message, Context], Message],
        *,
        clients: int,
        run_config: Mapping[str, Scalar],
        memory: Path | None = None,
    ) -> None:
        self._app = app
        self._config = dict(run_config)
        self._clients = clients
        self._memory = memory
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._numbers = itertools.count(1)
        # flwr.app.Message refuses to be built outside a task; this process is all tasks at once
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(range(1000, 1000 + self._clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            self._waiting[number] = message
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer the oldest waiting message among `message_ids`; one a call."""
        wanted = set(message_ids)
        for number in self._waiting:
            if number in wanted:
                return [self._answer(self._waiting.pop(number))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for number in self.push_messages(messages) for reply in self.pull_messages([number])]

    def _answer(self, message: Message) -> Message:
        index = message.metadata.dst_node_id - 1000
        node: dict[str, Scalar] = {"partition-id": index, "num-partitions": self._clients}
        if self._memory is not None:
            node["memory"] = str(self._memory)
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=node,
            state=RecordDict(),
            run_config=dict(self._config),
        )
        try:
            return self._app(message, context)
        except Exception as error:  # what a SuperNode does: the client is lost for this message, the run goes on
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
