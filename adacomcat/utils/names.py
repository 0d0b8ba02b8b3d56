"""Names that files on disk carry."""

# The timm architecture that rebuilds a compressed model from its config.json.
ENTRYPOINT = "adacomcat_vit"
