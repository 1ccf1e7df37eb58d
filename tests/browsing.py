"""A page in a real browser."""

from pathlib import Path
from typing import Any


WIDTHS = {"phone": 390, "laptop": 1280}


def looked_at(browser: Any, path: Path, device: str, scheme: str) -> None:
    """The page opens without an error, a request or sideways scrolling; every picture has words and is sharp."""
    page = browser.new_page(viewport={"width": WIDTHS[device], "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url),
    )
    page.goto(path.as_uri())
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device]
    pictures = page.locator("figure svg")
    assert pictures.count() > 0
    for picture in pictures.all():
        assert len(picture.get_attribute("aria-label")) > 5
        # Words of a panel are at least 7 pixels high; wide ones scroll inside their frame.
        box, view = picture.bounding_box(), picture.get_attribute("viewBox").split()
        assert box["width"] / float(view[2]) > 0.7
    page.close()
