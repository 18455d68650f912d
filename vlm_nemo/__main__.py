"""`python -m vlm_nemo VERB …`, for torchrun and launch/local.sh. Guarded: prepare's workers import it again."""

from vlm_nemo.cli import entry

if __name__ == "__main__":
    entry()
