"""python -m mamba_fast.evaluate: lm-eval's command line, with `--model mamba_fast` in its list of models.

Every flag is lm-eval's own; docs/evaluation.md has the command lines.
"""


def register():
    """Make lm-eval know the model "mamba_fast", for `lm_eval.simple_evaluate` and its command line.

    Returns the class. Raises ImportError, which names the extra to install, without lm-eval or what its
    models for transformers need.
    """
    try:
        from mamba_fast.harness_model import MambaFastLM
    except ImportError as error:
        raise ImportError(
            f"evaluation needs lm-eval, and {error.name or error} is missing: pip install 'mamba-fast[eval]'"
        ) from error
    return MambaFastLM


def main():
    """Run lm-eval on the arguments of this process."""
    try:
        register()
    except ImportError as error:
        raise SystemExit(str(error)) from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
