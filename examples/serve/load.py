"""How long answers take at a rate of requests: a table, and a chart of latency over the rate.

    python examples/serve/load.py dense=http://127.0.0.1:8000 small=http://127.0.0.1:8001

Requests leave at random moments whatever the service does (a Poisson process), as those of users
do. The services take turns at each rate. One is asked for no higher rate after half of its answers
took longer than ``--limit``.
"""

import argparse
import asyncio
import io
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median, quantiles

import httpx
import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RATES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
Curve = dict[float, tuple[float, float]]  # requests a second → median, 99th percentile in ms


def picture(side: int = 224, seed: int = 0) -> bytes:
    """Noise, as PNG."""
    content = io.BytesIO()
    noise = random.Random(seed).randbytes(3 * side * side)
    Image.frombytes("RGB", (side, side), noise).save(content, "png")
    return content.getvalue()


async def latencies(send: Callable[[], Awaitable[None]], rate: float, seconds: float,
                    seed: int) -> list[float]:
    """Milliseconds from the moment a request is due to its answer."""
    draw = random.Random(seed)

    async def one(due: float) -> float:
        await asyncio.sleep(due - time.perf_counter())
        await send()
        return 1e3 * (time.perf_counter() - due)

    moment, end, waiting = time.perf_counter(), time.perf_counter() + seconds, []
    while (moment := moment + draw.expovariate(rate)) < end or not waiting:
        waiting.append(asyncio.create_task(one(moment)))
    return await asyncio.gather(*waiting)


async def measure(services: dict[str, str], content: bytes, rates: tuple[float, ...],
                  seconds: float, limit: float) -> dict[str, Curve]:
    """Name of each service → its curve."""
    curves: dict[str, Curve] = {name: {} for name in services}
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        async def send(address: str) -> None:
            (await client.post(f"{address}/classify", content=content)).raise_for_status()

        for address in services.values():  # the first answers take longer
            await send(address)
        for rate in rates:
            for name, address in services.items():
                if any(middle > limit for middle, _ in curves[name].values()):
                    continue
                found = await latencies(lambda to=address: send(to), rate, seconds, seed=0)
                last = quantiles(found, n=100)[-1] if len(found) > 1 else found[0]
                curves[name][rate] = median(found), last
                print(f"{name}, {rate} a second: median {median(found):.1f} ms, "
                      f"99th percentile {last:.1f} ms", flush=True)
    return curves


def draw(curves: dict[str, Curve], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("#8a4b08", "#1f5f99", "#3d7a35", "#6b4396"),
                                     strict=False):
        rates = list(curve)
        axes.plot(rates, [curve[rate][0] for rate in rates], "o-", color=colour,
                  label=f"{name}: median")
        axes.plot(rates, [curve[rate][1] for rate in rates], "o:", color=colour,
                  label=f"{name}: 99th percentile")
    axes.set(xlabel="requests a second", ylabel="latency in ms", xscale="log", yscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def service(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not (name and equals and address):
        raise argparse.ArgumentTypeError(f"must be NAME=ADDRESS; got {text!r}")
    return name, address.rstrip("/")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("services", nargs="+", type=service, metavar="NAME=ADDRESS")
    parser.add_argument("--picture", type=Path, help="what is sent (default: noise, 224 x 224)")
    parser.add_argument("--seconds", type=float, default=10, help="at each rate")
    parser.add_argument("--limit", type=float, default=500, help="milliseconds")
    parser.add_argument("--output", type=Path, default=Path("latency.svg"))
    args = parser.parse_args()
    content = picture() if args.picture is None else args.picture.read_bytes()
    curves = asyncio.run(measure(dict(args.services), content, RATES, args.seconds, args.limit))
    draw(curves, args.output)
    print(f"chart: {args.output}")


if __name__ == "__main__":
    main()
