"""`timetuner usage`"""

from datetime import datetime
from itertools import islice
from typing import Annotated

import typer

from service.cli.connection import Url, connected
from service.cli.options import OfModel, find_model, given
from service.cli.output import AsJson, Limit, print_json, print_table

DAY = ["%Y-%m-%d"]


def usage(
    since: Annotated[datetime | None, typer.Option(formats=DAY, help="The first day, in UTC. [all]")] = None,
    until: Annotated[datetime | None, typer.Option(formats=DAY, help="The last day, in UTC. [today]")] = None,
    model: OfModel = None,
    owner: Annotated[str | None, typer.Option(help="The id of the API key that asked. [all that you may see]")] = None,
    limit: Limit = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show what jobs that ended used of networks and devices, by day, API key and model."""
    days = given(since=since and since.date(), until=until and until.date())
    with connected(url) as client:
        if model is not None:
            model = find_model(client, model)
        found = list(islice(client.usage(**given(model=model, key=owner), **days), limit))
    if as_json:
        print_json(found)
        return
    columns = ("day", "key", "model", "kind", "network calls", "rows", "device time")
    rows = (
        (
            str(one.day),
            one.key_name or one.key,
            one.model_name,
            one.kind,
            f"{one.network_calls:,.0f}",
            f"{one.network_rows:,.0f}",
            f"{one.device_seconds:,.1f} s",
        )
        for one in found
    )
    print_table(columns, rows)
