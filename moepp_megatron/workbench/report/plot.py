"""One plot of the page, or the sentence that replaces it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """A titled picture with its text.

    Attributes:
        caption: What the plot shows and how it is computed.
        image: ``data:`` address of the picture; None if there is nothing to draw.
        alt: The picture in words; without a picture, why there is none.
    """

    title: str
    caption: str
    image: str | None
    alt: str
    wide: bool = False
