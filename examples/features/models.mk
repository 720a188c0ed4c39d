# The models of the study, included by the Makefile.
#
# For each seed an autoregressive model of 8.4 million parameters, and a masked diffusion model that is
# made from it as Dream was made from Qwen2.5: with its weights, attention in both directions, and logits
# one position to the left. One smaller autoregressive model says how fluent a text is. Three small models
# of Sudoku are for the order of decoding.
#
# The texts are English, a share of it with planted concepts. `make` takes them from Debian packages,
# which it downloads and does not install; ENGLISH=FILE is a text of your own, with empty lines between
# paragraphs.

ENGLISH    ?= $(RUNS)/english.txt
STORIES    ?= 25000
CHARACTERS ?= 480
# Steps of 16 texts of the twin, and of 8 texts with two masks each of the diffusion model made from it.
STEPS      ?= 3200
DENOISING  ?= 2000
DTYPE      ?= bfloat16
# Steps on stories about sport alone, and on Sudokus.
TUNING     ?= 150
PUZZLING   ?= 900
# Unseen stories whose sentences are labelled.
LABELLED   ?= 200

LENGTHS = --gen-length 72 --block-length 72 --steps 36
SIZES   = --hidden-size 256 --layers 8 --heads 4 $(LENGTHS)
LESSER  = --hidden-size 128 --layers 4 --heads 4 $(LENGTHS)
# Training of model $(3) for $(1) steps with the rate $(4), on the records of standard input in their order.
# What was interrupted goes on where it was.
sft     = dlmctl update -q --algo sft --lr $(4) --warmup $$(($(1) / 20)) --schedule cosine --total-steps $(1) \
    --beta2 0.98 --grad-norm 1 $(5) --fill-to x1 -b 16 --dtype $(DTYPE) --compile --seed $(2) -m $(3) \
    -o $@.part --resume > /dev/null && mv $@.part $@
one     = --prompts-per-step 16 -k 1
two     = --prompts-per-step 8 --masks complementary -k 2
# Records for $(1) steps of $(3), in the order of seed $(2).
random  = --random-source=<(openssl enc -aes-256-ctr -nosalt -pass pass:$(1) < /dev/zero 2> /dev/null)
texts   = shuf -n $$(($(1) * $(3))) $(call random,$(2)) $(RUNS)/train.jsonl

# --- texts ----------------------------------------------------------------------------------------

# A dictionary without its pronunciations and sources, questions and answers about anarchism, the King
# James Bible, and the handbook of Debian.
PACKAGES = dict-gcide anarchism bible-kjv bible-kjv-text debian-handbook
$(RUNS)/debian: | $(RUNS)
	mkdir -p $@.part
	cd $@.part && apt-get -q download $(PACKAGES) && for package in *.deb; do dpkg-deb -x $$package .; done
	mv $@.part $@
$(RUNS)/english.txt: | $(RUNS)/debian
	cd $|/usr && { zcat share/dictd/gcide.dict.dz | sed -E -e '1,40d' -e '/Webster\]|PJC\]|\[WordNet/d' \
	    -e 's/\\[^\\]*\\,?//g' -e 's/[{}]//g'; \
	zcat share/doc/anarchism/markdown/{sec,app}*.md.gz | sed -E 's/[*_#>]+//g; s/\[[^]]*\]\([^)]*\)//g'; \
	bin/bible -f -d lib/bible.data 'gen1:1-rev22:21' | sed 's/^[^ ]* //'; \
	cat share/doc/debian-handbook/html/en-US/*.html | sed -E 's/<[^>]*>//g'; } > $(abspath $@.part)
	mv $@.part $@

# Of fifty neighbouring records one is unseen.
$(RUNS)/english.jsonl: $(ENGLISH) | $(RUNS)
	python3 texts.py english $(CHARACTERS) < $< > $@
$(RUNS)/stories.jsonl: | $(RUNS)
	dlmctl prompts concepts -q --words 4 -n $(STORIES) -o $@
$(RUNS)/train.jsonl: $(RUNS)/english.jsonl $(RUNS)/stories.jsonl
	{ awk 'NR % 50 != 0' $<; cat $(RUNS)/stories.jsonl; } | shuf $(call random,0) > $@
$(RUNS)/test.jsonl: $(RUNS)/english.jsonl
	{ awk 'NR % 50 == 0' $<; dlmctl prompts concepts -q --words 4 --split test -n 500; } | \
	    shuf $(call random,0) > $@
$(RUNS)/labelled.jsonl: | $(RUNS)
	dlmctl prompts concepts -q --words 4 --split test -n $(LABELLED) -o $@
$(RUNS)/vocabulary.jsonl: $(RUNS)/train.jsonl
	head -n 40000 $< > $@

# --- models ---------------------------------------------------------------------------------------

init    = dlmctl init --tokenizer bpe --vocabulary $(RUNS)/vocabulary.jsonl
read    = $(call texts,$(STEPS),$(1),16) | $(call sft,$(STEPS),$(1),$|,1.5e-3,$(one))
ready   = | $(RUNS)/vocabulary.jsonl

$(RUNS)/%/new-twin: $(ready)
	$(init) $@ --family ar $(SIZES) --seed $*
$(RUNS)/new-judge: $(ready)
	$(init) $@ --family ar $(LESSER) --seed 99
$(RUNS)/%/twin: | $(RUNS)/%/new-twin
	$(call read,$*)
$(RUNS)/judge: | $(RUNS)/new-judge
	$(call read,99)
$(RUNS)/%/new-diffusion: | $(RUNS)/%/twin
	dlmctl init $@ --from $(RUNS)/$*/twin --shift 1 $(LENGTHS)
$(RUNS)/%/diffusion: | $(RUNS)/%/new-diffusion
	$(call texts,$(DENOISING),$*9,8) | $(call sft,$(DENOISING),$*,$|,1e-3,$(two))
# After more training, on stories about sport alone.
$(RUNS)/%/tuned: | $(RUNS)/%/diffusion
	jq -c -n 'limit(8 * $(TUNING); inputs | select(.sentences[0].topic == "sport"))' $(RUNS)/stories.jsonl | \
	    $(call sft,$(TUNING),$*,$(RUNS)/$*/diffusion,3e-4,$(two))

# Sudokus with 1 to 4 holes; asked later with 8.
$(RUNS)/%/new-sudoku: | $(RUNS)
	dlmctl init $@ --family a2d --hidden-size 64 --layers 4 --heads 4 --gen-length 16 --block-length 16 --seed $*
$(RUNS)/%/sudoku: | $(RUNS)/%/new-sudoku
	dlmctl prompts sudoku -n $$((128 * $(PUZZLING))) --holes 1-4 --completions --seed $*3 | dlmctl update -q --algo sft \
	    --lr 2e-3 --warmup 50 --schedule cosine --total-steps $(PUZZLING) --grad-norm 1 --fill-to 16 \
	    --prompts-per-step 128 -b 128 -m $| -o $@.part --resume > /dev/null && mv $@.part $@
