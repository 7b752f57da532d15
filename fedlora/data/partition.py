"""Which client holds which rows. The dealing of rows is that of `flwr-datasets`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora.config import DataConfig
from fedlora.data.rows import Row
from fedlora.data.sources import data_files
from fedlora.errors import ConfigError, DataError
from fedlora.rng import stream

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = NDArray[np.int64]
_REDRAWS = 10  # fresh seeds for Dirichlet, each good for ten draws of flwr-datasets


def partition(rows: Sequence[Row], config: DataConfig, *, clients: int, seed: int) -> list[Indices]:
    """The sorted row indices of each client: disjoint, together all rows. A client may hold none.

    `iid`: equal shares of a shuffle. `dirichlet`: for each value of the key (else the label, else the group) the shares
    of the clients are drawn from Dirichlet(alpha) (Yurochkin et al. 2019, arXiv:1905.12022), until every client has
    `minimum_rows`. `natural`: the rows of one owner stay together; owners are dealt, largest first, to the client with
    the fewest rows. `files`: one file per client, in sorted order.

    Raises: DataError if there are no rows, no key, fewer owners than clients, or no draw meets `minimum_rows`;
    ConfigError if files and clients do not fit, and for kind `skills` (see `deal`).
    """
    if clients < 1:
        raise ConfigError(f"rounds.clients must be at least 1, got {clients}")
    if not len(rows):
        raise DataError(f"{config.name}: all {clients} clients would be empty: there are no rows")
    kind = config.partition.kind
    if kind == "files":
        return _by_file(rows, config, clients)
    if kind == "skills":
        raise ConfigError(f"data.partition.kind skills deals generated rows, see `deal`; {config.name} has its own")
    if kind == "natural":
        return _by_owner(rows, config, clients)
    if kind == "dirichlet":
        return _dirichlet(rows, config, clients, seed)
    from flwr_datasets.partitioner import IidPartitioner

    shuffled = stream(seed, "iid partition").permutation(len(rows))
    parts = _parts(IidPartitioner(min(clients, len(rows))), [""] * len(rows))
    return [np.sort(shuffled[part]) for part in parts] + [np.empty(0, np.int64)] * (clients - len(parts))


def deal(skills: Sequence[str], *, clients: int, per_client: int, seed: int) -> list[tuple[str, ...]]:
    """The skills of each client, `per_client` different ones each (all, if there are fewer).

    Client after client takes those that the fewest hold, ties by lot: so the numbers of holders differ by at most one.
    Raises: ConfigError if clients * per_client < number of skills, which would leave some to nobody.

    >>> deal(("a", "b", "c"), clients=3, per_client=2, seed=0)
    [('b', 'c'), ('a', 'b'), ('a', 'c')]
    """
    if clients * per_client < len(skills):
        raise ConfigError(
            f"data.partition.skills_per_client: {clients} clients with {per_client} skills each cannot hold all "
            f"{len(skills)}; raise it to {-(-len(skills) // clients)}, or name fewer in data.skills"
        )
    rng = stream(seed, "deal skills")
    holders = np.zeros(len(skills), np.int64)
    dealt = []
    for _ in range(clients):
        lot = rng.permutation(len(skills))
        taken = np.sort(lot[np.argsort(holders[lot], kind="stable")][:per_client])
        holders[taken] += 1
        dealt.append(tuple(skills[i] for i in taken))
    return dealt


def _by_file(rows: Sequence[Row], config: DataConfig, clients: int) -> list[Indices]:
    files = [str(file) for file in data_files(config)]
    if len(files) != clients:
        raise ConfigError(
            f"data.partition.kind files: {config.name} holds {len(files)} files for {clients} clients; "
            f"set rounds.clients = {len(files)}"
        )
    owners = np.array([row.owner for row in rows])
    return [np.flatnonzero(owners == file) for file in files]


def _by_owner(rows: Sequence[Row], config: DataConfig, clients: int) -> list[Indices]:
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    keys = [row.owner for row in rows if row.owner is not None]
    if config.partition.key is None or len(keys) < len(rows):
        raise DataError(
            "data.partition.kind natural needs data.partition.key, the column that names the owner, "
            f"and a value in every row; key is {config.partition.key!r}, {len(rows) - len(keys)} rows have none"
        )
    parts = _parts(GroupedNaturalIdPartitioner("key", group_size=1, sort_unique_ids=True), keys)
    if len(parts) < clients:
        raise DataError(
            f"{config.name}: column {config.partition.key!r} names {len(parts)} owners for {clients} clients; "
            f"set rounds.clients to at most {len(parts)}"
        )
    held: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients, np.int64)
    for part in sorted(parts, key=len, reverse=True):
        lightest = int(np.argmin(sizes))
        held[lightest].append(part)
        sizes[lightest] += len(part)
    return [np.sort(np.concatenate(owned)) for owned in held]


def _dirichlet(rows: Sequence[Row], config: DataConfig, clients: int, seed: int) -> list[Indices]:
    from flwr_datasets.partitioner import DirichletPartitioner

    settings = config.partition
    if settings.key is None:
        keys = [row.group if row.label is None else row.label for row in rows]
    else:
        keys = [row.owner or "" for row in rows]
    if not any(keys):
        raise DataError(f"{config.name}: dirichlet needs a label, a group or data.partition.key; the rows have none")
    rng = stream(seed, "dirichlet partition")
    for _ in range(_REDRAWS):
        dealer = DirichletPartitioner(
            clients, "key", settings.alpha, settings.minimum_rows, self_balancing=False, seed=int(rng.integers(2**31))
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # one for each draw that is not good enough
                return [np.sort(part) for part in _parts(dealer, keys)]
        except ValueError:
            continue
    raise DataError(
        f"{config.name}: no Dirichlet draw with alpha {settings.alpha:g} gave each of {clients} clients "
        f"{settings.minimum_rows} of {len(rows)} rows; raise data.partition.alpha, lower rounds.clients, "
        "or set data.partition.minimum_rows = 0"
    )


def _parts(dealer: Partitioner, keys: list[str]) -> list[Indices]:
    """The rows of each part that a flwr-datasets partitioner makes of this column of keys."""
    from datasets import Dataset

    dealer.dataset = Dataset.from_dict({"row": np.arange(len(keys)), "key": keys})
    return [np.array(dealer.load_partition(i)["row"], np.int64) for i in range(dealer.num_partitions)]
