"""`python -m attention_jax.pretrained`: the published architectures that can be loaded."""

from attention_jax.pretrained import FAMILIES
from attention_jax.pretrained.gguf_models import ARCHITECTURES


def main() -> None:
    """Print one line per family."""
    width = max(len(family.title) for family in FAMILIES)
    print("Folders of Hugging Face (config.json and safetensors), by model_type:")
    for family in FAMILIES:
        print(f"  {family.title:{width}}  {', '.join(family.model_types)}")
    print(f"GGUF files, by general.architecture: {', '.join(ARCHITECTURES)}")


if __name__ == "__main__":
    main()
