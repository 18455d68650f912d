"""`python -m vlm_nemo VERB …`, for torchrun and launch/*.sh. Guarded: prepare's workers import it again."""

if __name__ == "__main__":
    import sys

    from vlm_nemo.runtime import signals

    if sys.argv[1:2] == ["train"]:
        signals.hold()  # before anything that takes time to import

    from vlm_nemo.cli import entry

    entry()
