# The usual commands; each is a script in launch/, which says what else it can do.
.PHONY: help setup check test docs quickstart
help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12
setup:  ## .venv with pinned packages, for working on the code
	bash launch/setup.sh dev
check:  ## style, types, layering
	bash launch/check.sh
test:  ## check, and every test that is not slow; ARGS="-k sampler" goes to pytest
	bash launch/test.sh $(ARGS)
docs:  ## the documentation site, built strict into site/
	bash launch/docs.sh
quickstart:  ## train, evaluate and search in twenty minutes
	bash launch/quickstart.sh
