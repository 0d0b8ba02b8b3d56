"""The flags of ComCAT's and Adaptive-ComCAT's main.py, and what stands for each of them here."""

# Reference flag → (our words, a remark); no words where nothing stands for it.
REFERENCE = {
    "--model": ("-m", ""),
    "--load": ("--checkpoint", "or --pretrained, for the same weights from timm"),
    "--finetune": ("--checkpoint", ""),
    "--input-size": ("--img-size", ""),
    "--data-path": ("--data", ""),
    "--data-set": ("--data", "torch/cifar10, torch/cifar100, torch/inaturalist, or a folder"),
    "--search-rank": ("--preset comcat", "or --preset adaptive-comcat"),
    "--target-params-reduction": ("--keep-params", "1 minus it, and of all parameters"),
    "--batch-size-search": ("--search-batch-size", ""),
    "--beta-search": ("--search-beta", ""),
    "--finetune-rank-dir": ("-m --dense", "the folder that the search wrote"),
    "--attn2-with-bias": ("", "on; without it --no-attention-biases"),
    "--with-align": ("--align comcat", "on in the presets; without it --align none"),
    "--distillation-type": ("--kd", ""),
    "--distillation-alpha": ("--kd-alpha", ""),
    "--distillation-tau": ("--kd-temperature", ""),
    "--distillation-without-token": ("", "the student decides: one with a token distils by it"),
    "--teacher-model": ("--teacher", "the model itself where it is left out"),
    "--teacher-path": ("--teacher-checkpoint", ""),
    "--batch-size": ("-b", "counts all processes"),
    "--epochs": ("--epochs", ""),
    "--opt": ("--opt", ""), "--opt-eps": ("--opt-eps", ""), "--opt-betas": ("--opt-betas", ""),
    "--momentum": ("--momentum", ""), "--weight-decay": ("--weight-decay", ""),
    "--clip-grad": ("--clip-grad", "off in the presets"),
    "--lr": ("--lr", ""),
    "--unscale-lr": ("--lr-base none", "the presets have --lr-base 512"),
    "--sched": ("--sched", ""), "--warmup-lr": ("--warmup-lr", ""), "--min-lr": ("--min-lr", ""),
    "--warmup-epochs": ("--warmup-epochs", ""),
    "--drop-path": ("--drop-path", ""),
    "--model-ema": ("--model-ema", "the code takes no average, whatever it says"),
    "--model-ema-decay": ("--model-ema-decay", ""),
    "--bce-loss": ("--bce-loss", "with --smoothing 0"),
    "--smoothing": ("--smoothing", ""),
    "--aa": ("--aa", ""), "--ThreeAugment": ("--aa 3a", ""),
    "--color-jitter": ("--color-jitter", ""),
    "--train-interpolation": ("--train-interpolation", ""),
    "--reprob": ("--reprob", ""), "--remode": ("--remode", ""), "--recount": ("--recount", ""),
    "--repeated-aug": ("--repeated-aug 3", "on several processes alone"),
    "--mixup": ("--mixup", ""), "--cutmix": ("--cutmix", ""),
    "--cutmix-minmax": ("--cutmix-minmax", ""), "--mixup-prob": ("--mixup-prob", ""),
    "--mixup-switch-prob": ("--mixup-switch-prob", ""), "--mixup-mode": ("--mixup-mode", ""),
    "--output_dir": ("-o", ""), "--resume": ("--resume", "reads our state"),
    "--device": ("--device", ""), "--seed": ("--seed", ""), "--num_workers": ("-j", ""),
    "--eval": ("", "the command `adacomcat evaluate`"),
    "--drop": ("", "0 in the published commands"),
    "--attn-only": ("", ""), "--src": ("", ""), "--resplit": ("", ""), "--lr-noise": ("", ""),
    "--lr-noise-pct": ("", ""), "--lr-noise-std": ("", ""), "--decay-epochs": ("", ""),
    "--decay-rate": ("", ""), "--cooldown-epochs": ("", ""), "--patience-epochs": ("", ""),
    "--inat-category": ("", ""), "--start_epoch": ("", ""),
}

def rows() -> list[tuple[str, str, str]]:
    """(reference flag, ours, remark); those without either are left out."""
    return [(f"`{flag}`", f"`{ours}`" if ours else "–", remark or "–")
            for flag, (ours, remark) in REFERENCE.items() if ours or remark]


def without() -> list[str]:
    """The flags for which nothing stands here; the published commands do not use them."""
    return [flag for flag, (ours, remark) in REFERENCE.items() if not (ours or remark)]
