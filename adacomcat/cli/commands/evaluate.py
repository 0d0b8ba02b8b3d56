"""adacomcat evaluate: accuracy and loss on the test images, on any number of processes."""

import argparse

from adacomcat import cost
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.distill.evaluation import evaluate
from adacomcat.report.tables import Comparison, print_comparison
from adacomcat.utils.distributed import start_processes, stop_processes

GATE_FAILED = 3


def run(args: argparse.Namespace) -> Outcome:
    inputs.device(args)
    model = inputs.model(args)
    _, test = inputs.train_and_test(args, model)
    processes = start_processes(args.device, args.timeout)
    measured = evaluate(model.to(processes.device), test, args.batch_size, processes, args.workers)
    stop_processes()
    result = {"model": args.model, "data": args.data, "params": cost.model_params(model)} | measured
    gate = args.min_accuracy is not None and result["top1"] < args.min_accuracy
    measures = {name: result[name] for name in ("params", "top1", "top5", "loss")}

    def show() -> None:
        print_comparison(f"{args.data}, {len(test):,} test images",
                         Comparison({args.model: measures}))
        if gate:
            print(f"gate failed: top-1 {result['top1']:.2f} is below {args.min_accuracy:g}")
    return Outcome(result | {"passed": not gate}, show, GATE_FAILED if gate else 0)
