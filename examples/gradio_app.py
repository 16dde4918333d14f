"""A web page that answers questions about uploaded images, and draws the boxes in the answers.

pip install '.[gradio]'
python examples/gradio_app.py [MODEL_FOLDER_OR_HUB_ID]
"""

import sys
from typing import Any

import gradio
from PIL import Image

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.demo.answering import answer, load


def make_page(name: str = MODEL) -> gradio.Blocks:
    model, processor = load(name)

    def ask(image: Image.Image | None, question: str) -> tuple[str, Any]:
        if image is None or not question.strip():
            raise gradio.Error("Choose an image and type a question.")
        reply = answer(model, processor, image, [question])[0]
        boxes = [(tuple(round(value) for value in box), f"box {number}") for number, box in enumerate(reply.boxes, 1)]
        return reply.text, (image, boxes)

    with gradio.Blocks(title="MF-RSVLM") as page:
        gradio.Markdown(f"# Ask about an overhead image\n\nModel: `{name}`. Answers may be wrong, above all counts.")
        with gradio.Row():
            image = gradio.Image(SCENE, type="pil", label="Image")
            boxes = gradio.AnnotatedImage(label="Boxes in the answer")
        question = gradio.Textbox("Give the bounding box of the building.", label="Question")
        text = gradio.Textbox(label="Answer", interactive=False)
        gradio.Button("Ask", variant="primary").click(ask, [image, question], [text, boxes], api_name="ask")
        question.submit(ask, [image, question], [text, boxes], api_name=False)
    return page


if __name__ == "__main__":
    make_page(*sys.argv[1:2]).launch()
