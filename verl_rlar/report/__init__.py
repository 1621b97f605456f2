# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one HTML file, made of the ledger and the library, which are only read.

    from verl_rlar.report import figures, page

    gathered = figures.gather(Path("checkpoints/run/rlar"), library)     # plain, JSON-like values
    Path("report.html").write_bytes(page.render(gathered))

`reading` opens a ledger in one consistent state; `figures` counts in SQL, and samples where it would have to read all;
`tools`, `samples`, `agents` and `alarms` make the parts of the same names; `page` puts the figures into a file that
needs nothing else; `live` serves that page on loopback while a training goes on.
"""
