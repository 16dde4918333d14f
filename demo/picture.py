"""Draws an image with boxes, questions and answers."""

from PIL import Image, ImageDraw, ImageFont


PANEL = 512  # pixels


def draw_answers(image: Image.Image, answers: list[tuple[str, str]], boxes: list[tuple[str, list[float]]]) -> Image.Image:
    """The image with its boxes on the left, questions and answers on the right.

    Args:
        image: an RGB image of any size; it is scaled to `PANEL` pixels.
        answers: question and answer, in this order. Long ones are wrapped.
        boxes: color and (x1, y1, x2, y2) of each box, in pixels of the image.
    """
    scale = PANEL / max(image.size)
    left = image.resize((round(image.width * scale), round(image.height * scale)))
    picture = Image.new("RGB", (2 * PANEL + 48, PANEL), "white")
    picture.paste(left)
    pen = ImageDraw.Draw(picture)
    for color, box in boxes:
        x1, y1, x2, y2 = (value * scale for value in box)
        pen.rectangle((x1 - 3, y1 - 3, x2 + 3, y2 + 3), outline=color, width=2)
    font = ImageFont.load_default(13)
    y = 10
    for pair in answers:
        for color, text in zip(("black", "#1f5f8b"), pair, strict=True):
            words = text.split()
            while words:
                count = len(words)
                while count > 1 and font.getlength(" ".join(words[:count])) > PANEL + 20:
                    count -= 1
                pen.text((PANEL + 14, y), " ".join(words[:count]), fill=color, font=font)
                words, y = words[count:], y + 18
        y += 7
    return picture
