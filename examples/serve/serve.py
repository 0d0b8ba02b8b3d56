"""A web service that classifies pictures: send a JPEG or PNG to POST /classify.

    python examples/serve/serve.py runs/small
    curl --data-binary @picture.jpg http://127.0.0.1:8000/classify

Starlette calls ``classify`` in its own threads. The kernels give Python's lock away while they
run, and share their helpers among all callers.
"""

import argparse
import io

import timm.data
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, UnidentifiedImageError
from starlette.concurrency import run_in_threadpool
from torch import nn

import adacomcat

MODES = {1: "L", 3: "RGB"}


def load(folder: str, dense: bool = False) -> nn.Module:
    """The optimised model of a checkpoint folder, or its dense form without our kernels."""
    model = adacomcat.load(folder)
    return adacomcat.to_dense(model) if dense else adacomcat.optimize(model)


def make_app(model: nn.Module) -> FastAPI:
    """The service around a model in eval mode."""
    app = FastAPI()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    mode = MODES[config["input_size"][0]]

    @torch.inference_mode()
    def classify(content: bytes) -> dict[str, list]:
        try:
            picture = Image.open(io.BytesIO(content)).convert(mode)
        except UnidentifiedImageError as error:
            raise HTTPException(415, "send a JPEG or PNG") from error
        probability = model(transform(picture).unsqueeze(0)).softmax(1)[0]
        best = probability.topk(min(5, len(probability)))
        return {"classes": best.indices.tolist(), "probabilities": best.values.tolist()}

    @app.post("/classify")
    async def answer(request: Request) -> dict[str, list]:
        return await run_in_threadpool(classify, await request.body())

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", help="checkpoint folder of a compressed model")
    parser.add_argument("--dense", action="store_true", help="serve the dense form, to compare")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(make_app(load(args.folder, args.dense)), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
