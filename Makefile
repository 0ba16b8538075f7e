# Shortcuts. The two that matter also run without make: bash examples/quickstart.sh, bash tests/run.sh.
.PHONY: test quick quickstart format

test:        ## every check and test
	bash tests/run.sh
quick:       ## every check and the fast tests
	bash tests/run.sh -m "not slow"
quickstart:  ## the whole of DoReMi on this machine
	bash examples/quickstart.sh
format:      ## rewrite the sources in the house format
	bash -c 'source examples/environment.sh; use_environment requirements-dev.txt; $$PYTHON -m ruff check --fix . ; $$PYTHON -m ruff format .'
