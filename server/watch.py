"""The Prometheus endpoint of a deployed server: what `fedlora status` tells, as numbers, on this machine's loopback.

Every scrape reads the run's files anew; nothing is kept or counted here. No series is of one node, so that nobody who
may scrape learns who took part in which round.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedlora.deploy import DeployFile
from fedlora.errors import ConfigError
from fedlora.watching import STATES, Watcher

__all__ = ["StatusCollector", "endpoint"]

_HOST: Final = "127.0.0.1"
_PATIENCE: Final = 10.0  # seconds for a scrape that is being answered when the endpoint closes


class StatusCollector(Collector):
    """The state of one deployment in Prometheus' terms; what no file tells yet has no series.

    Counters are of the run that lies in the folder: another run, or one that goes back to a checkpoint, resets them.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()  # a watcher remembers how far it has read, and scrapes may overlap

    def describe(self) -> list[Metric]:
        """Nothing: a registry would otherwise read all files to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One look. Raises: WatchError if a file is there and may not be read, which the scraper gets as status 500."""
        with self._lock:
            found = self._watcher.look(at=datetime.now(UTC))
        gauges = (
            ("round", "Rounds that are closed.", found.round),
            ("rounds", "Rounds of the whole run.", found.rounds),
            ("nodes_enrolled", "Nodes that are enrolled and not revoked.", found.enrolled),
            ("quarantined", "Nodes that are no longer asked.", sum(node.quarantined for node in found.nodes)),
            ("round_seconds", "How long the last closed round took.", found.last_seconds),
            ("certificate_days", "Days until the certificate of the server or of its CA ends.", found.certificate_days),
        )
        for name, words, value in gauges:
            if value is not None:
                yield GaugeMetricFamily(f"fedlora_{name}", words, value=value)
        yield CounterMetricFamily("fedlora_answers", "Answers of nodes that were accepted.", value=found.answers)
        missing = CounterMetricFamily("fedlora_missing", "Answers that did not come, by rule.", labels=["rule"])
        refusals = CounterMetricFamily("fedlora_refusals", "Answers and nodes refused, by rule.", labels=["rule"])
        for family, rules in ((missing, found.missing), (refusals, found.refusals)):
            for rule, count in rules.items():
                family.add_metric([rule], count)
        traffic = CounterMetricFamily(
            "fedlora_bytes", "Bytes of answers and asks, in closed rounds.", labels=["direction"]
        )
        traffic.add_metric(["up"], found.bytes_up)
        traffic.add_metric(["down"], found.bytes_down)
        up = GaugeMetricFamily("fedlora_up", "Whether a program of the server runs.", labels=["program"])
        for program, runs in found.programs.items():
            up.add_metric([program], float(runs))
        state = GaugeMetricFamily("fedlora_state", "1 for the state that the run is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == found.state))
        yield from (missing, refusals, traffic, up, state)


@contextmanager
def endpoint(deploy: DeployFile) -> Iterator[None]:
    """Answer scrapes at http://127.0.0.1:`deploy.metrics`/metrics inside the block; with port 0 do nothing.

    Raises: ConfigError if the port is taken or may not be used.
    """
    if deploy.metrics == 0:
        yield
        return
    scrapes = CollectorRegistry()
    scrapes.register(StatusCollector(Watcher(deploy.folder, deploy)))
    try:
        httpd, thread = start_http_server(deploy.metrics, addr=_HOST, registry=scrapes)
    except OSError as error:
        raise ConfigError(
            f"metrics: port {deploy.metrics} of {_HOST} cannot be used: {error.strerror}; set another, or 0 for none"
        ) from error
    try:
        yield
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join(_PATIENCE)
