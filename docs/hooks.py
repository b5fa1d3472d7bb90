"""What the site needs beyond the pages: the HTTP API's operations, and no links to files outside it."""

import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from service.app import create_app

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def keep(link: re.Match[str]) -> str:
        """Of files of the repository that are no pages, the name alone."""
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if outside else link[0]

    return LINK.sub(keep, markdown).replace("<!-- operations -->", "\n".join(_operations(create_app().openapi())))


def _operations(document: dict[str, Any]) -> Iterator[str]:
    for tag in document["tags"]:
        yield f"## {tag['name'].capitalize()}\n\n{tag['description']}\n"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if operation["tags"] == [tag["name"]]:
                    yield from _operation(path, method, operation)


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {operation['summary']}\n\n`{method.upper()} {path}`\n\n{operation['description']}\n"
    scopes = [scope for scheme in operation["security"] for scope in scheme.get("api_key", [])]
    if scopes:
        yield f"Needs the scope `{', '.join(scopes)}`.\n"
    if parameters := [parameter for parameter in operation.get("parameters", []) if parameter["in"] != "path"]:
        yield "| parameter | in | |\n| --- | --- | --- |"
        for parameter in parameters:
            yield f"| `{parameter['name']}` | {parameter['in']} | {parameter.get('description', '')} |"
        yield ""
    yield from _example("Request", operation.get("requestBody", {}))
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            yield from _example(status, answer)
    answers = sorted(operation["responses"].items())
    errors = [f"{status} {answer['description']}" for status, answer in answers if status.startswith(("4", "5"))]
    yield f"Errors: {', '.join(errors)}\n"


def _example(title: str, message: dict[str, Any]) -> Iterator[str]:
    body = message.get("content", {}).get("application/json", {})
    if "example" in body:
        yield f'??? example "{title}"\n'
        yield "    ```json"
        yield from (f"    {line}" for line in json.dumps(body["example"], indent=2).splitlines())
        yield "    ```\n"
