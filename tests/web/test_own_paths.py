"""A login leads to a page of this service, whatever the form says."""

import re

import pytest

from service.web.forms import OWN_PATH


@pytest.mark.parametrize("path", ["/", "/jobs", "/schedules?status=accepted&page=2", "/models/mdl_01#data", "/a/%2F/b"])
def test_pages_of_this_service_are_followed(path: str) -> None:
    assert re.fullmatch(OWN_PATH, path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "jobs",
        "https://elsewhere.example/",
        "//elsewhere.example/",
        "/\\elsewhere.example/",
        "/\t/elsewhere.example/",
        "/\n/elsewhere.example/",
        "/\r\n/elsewhere.example/",
        "/jobs\r\nSet-Cookie: a=b",
        "/jobs\x00",
        "/ /elsewhere.example/",
        "/jobs\\elsewhere.example",
    ],
)
def test_anything_that_a_browser_could_take_for_another_host_is_not_followed(path: str) -> None:
    assert not re.fullmatch(OWN_PATH, path)
