"""The form that every refusal must have."""

from typing import Any

import httpx


def assert_problem(response: httpx.Response, status: int, field: str | None = None, accepted: str | None = None) -> Any:
    """An RFC 9457 problem with this status that names the field and says what is accepted; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    if field is not None:
        locations = [".".join(map(str, error["loc"])) for error in problem["errors"]]
        assert any(field in location for location in locations), problem
    if accepted is not None:
        assert accepted in problem["detail"], problem
    return problem
