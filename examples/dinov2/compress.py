"""DINOv2 ViT-S/14 compressed without training: the error of its final tokens on other photos."""

import argparse
import time

import torch
from backbone import load_backbone
from fidelity import compare, tokens
from photos import TEST_EVERY, calibration_crops, crops, split

import adacomcat
from adacomcat.cost import model_params


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-params", type=float, default=0.5,
                        help="share of the parameters to keep")
    parser.add_argument("--crops", type=int, default=256, help="crops that calibrate")
    parser.add_argument("--test-crops", type=int, default=96, help="crops that test")
    parser.add_argument("--photos", action="append", default=[], metavar="FOLDER",
                        help="a folder with more photos (jpg), split by file like the bundled ones")
    parser.add_argument("--split", type=int, default=0, choices=range(TEST_EVERY),
                        help="every fourth photo tests, from this one on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model = load_backbone()
    calibration_files, test_files = split(args.photos, first=args.split)
    calibration = calibration_crops(calibration_files, args.crops, args.seed)
    test = crops(test_files, args.test_crops, args.seed + 1)
    dense = tokens(model, test)
    print(f"{len(calibration_files)} photos calibrate, {len(test_files)} test")

    start = time.perf_counter()
    compressed = adacomcat.compress(model, keep_params=args.keep_params, calibration=calibration)
    seconds = time.perf_counter() - start
    plain = adacomcat.compress(model, keep_params=args.keep_params)
    for name, network in (("plain SVD, without images", plain), ("adacomcat", compressed)):
        error, cosine = compare(dense, tokens(network, test))
        print(f"{name:26s} kept {model_params(network) / model_params(model):.3f}  "
              f"error {error:.3f}  cls cosine {cosine:.3f}")
    for index, path in enumerate(test_files):
        mine = test[index::len(test_files)]
        error, cosine = compare(tokens(model, mine), tokens(compressed, mine))
        print(f"  {path.stem:40s} error {error:.3f}  cls cosine {cosine:.3f}")
    print(f"compressed in {seconds:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
