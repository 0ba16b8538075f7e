# Shortcuts. The two that matter also run without make: bash examples/quickstart.sh, bash tests/run.sh.
.PHONY: help quickstart test quick format

help:        ## this list (the default)
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+): *## *(.*)/make \1\t\2/' | expand -t 18
quickstart:  ## the whole of DoReMi on this machine, in some minutes
	bash examples/quickstart.sh
test:        ## every check and test, in 14 to 20 minutes
	bash tests/run.sh
quick:       ## every check and the fast tests
	bash tests/run.sh -m "not slow"
format:      ## rewrite the sources in the house format
	bash -c 'source examples/environment.sh; use_environment requirements-dev.txt; $$PYTHON -m ruff check --fix . ; $$PYTHON -m ruff format .'
