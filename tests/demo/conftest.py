from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small work on one thread: on a busy machine two would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Page(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.addresses, self.ids, self.text, self.tags = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "poster", "data", "srcset"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text.append(data)


def self_contained(html: str) -> Page:
    page = Page(html)
    assert page.addresses
    assert all(a.startswith(("data:", "#")) for a in page.addresses), [a[:60] for a in page.addresses]
    assert not re.search(r"url\((?!#)|@import|https?://", html)
    assert "link" not in page.tags
    assert len(page.ids) == len(set(page.ids)), "an id occurs twice"
    for address in page.addresses:
        assert not address.startswith("#") or address[1:] in page.ids, address
    return page


@pytest.fixture
def read_page():
    """read_page(html) parses a report after checking that it needs nothing beside itself."""
    return self_contained
