"""Secure aggregation, "fedlora-secagg/1": a server learns the sum of its clients' vectors, not the vectors.

The protocol is that of Bonawitz et al. (CCS 2017, doi 10.1145/3133956.3133982) against an active server, on the sparse
graph of Bell et al. (CCS 2020, doi 10.1145/3372297.3417885) beyond 30 clients. What is ours: shares are committed to
one by one, so that whoever tampers is named; both lists of members, not only the last, are in what clients sign; sums
over clients of mixed ranks are refused where a column would be the sum of too few; a retry is refused where the
attempt before it could still be opened.

    stage      client -> server                                      server -> client
    advertise  two X25519 keys, hash of a seed, signed               those of the neighbours
    share      sealed Shamir shares of mask key and seed, signed     who shared, and the shares meant for the client
    mask       fixed point + own mask +- mask of each neighbour      who survived
    confirm    signature over who shared and who survived            neighbours' signatures, who is alive, who is gone
    unmask     per neighbour a share of its seed or of its key       -

Nothing here sends: `client.Client` and `server.Server` take and give the values of `messages`, which become bytes. A
session is for one sum; a new attempt is a new context and new keys. `consent.Consent` is what a client must remember
between sessions, on disk, for its promise to hold.

Not hidden: the roster, the ranks, who dropped out, and what the sum itself shows; sums over few clients need
differential privacy besides. The signing keys must have been certified by somebody other than the server alone, or it
enrols clients of its own. Python cannot erase keys from memory; dropping the last reference is all that is done.
"""
