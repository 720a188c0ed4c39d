# The models of the study, included by the Makefile.
#
# For each seed a masked diffusion model and its autoregressive twin, of 8.4 million parameters, which
# see the same texts in the same order; and a diffusion model that was made from the twin the way that
# Dream was made, with its logits one position to the left. One smaller autoregressive model says how
# fluent a text is. Three small models of Sudoku are for the order of decoding.
#
# The texts are English, a share of it with planted concepts. `make` takes them from Debian packages,
# which it downloads and does not install; ENGLISH=FILE is a text of your own, with empty lines between
# paragraphs.

ENGLISH    ?= $(RUNS)/english.txt
STORIES    ?= 25000
CHARACTERS ?= 480
STEPS      ?= 3200
BATCH      ?= 16
RATE       ?= 1.5e-3
DTYPE      ?= bfloat16
# Steps on stories about sport alone, and on Sudokus.
TUNING     ?= 150
PUZZLING   ?= 900
# Unseen stories whose sentences are labelled.
LABELLED   ?= 400

LENGTHS = --gen-length 72 --block-length 72 --steps 36
SIZES   = --hidden-size 256 --layers 8 --heads 4 $(LENGTHS)
LESSER  = --hidden-size 128 --layers 4 --heads 4 $(LENGTHS)
# Training of model $(3) for $(1) steps with the rate $(4), the records of standard input in their order.
sft     = dlmctl update -q --algo sft --lr $(4) --warmup $$(($(1) / 20)) --schedule cosine --total-steps $(1) \
    --beta2 0.98 --grad-norm 1 -k 1 --masks independent --fill-to x1 --prompts-per-step $(BATCH) -b 16 \
    --dtype $(DTYPE) --compile --seed $(2) -m $(3) -o $(@D) > $(@D).jsonl
# Records for $(1) steps, in the order of seed $(2).
random  = --random-source=<(openssl enc -aes-256-ctr -nosalt -pass pass:$(1) < /dev/zero 2> /dev/null)
texts   = shuf -n $$(($(1) * $(BATCH))) $(call random,$(2)) $(RUNS)/train.jsonl

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
learnt  = $(call texts,$(1),$(2)) | $(call sft,$(1),$(2),$(3),$(RATE))
ready   = | $(RUNS)/vocabulary.jsonl
QUARTER = $$(($(STEPS) / 4))

$(RUNS)/%/new-llada: $(ready)
	$(init) $@ --family llada $(SIZES) --seed $*
$(RUNS)/%/new-ar: $(ready)
	$(init) $@ --family ar $(SIZES) --seed $*
$(RUNS)/new-judge: $(ready)
	$(init) $@ --family ar $(LESSER) --seed 99
$(RUNS)/%/new-dream: | $(RUNS)/%/ar/latest
	dlmctl init $@ --from $(RUNS)/$*/ar --shift 1 $(LENGTHS)
$(RUNS)/%/llada/latest: | $(RUNS)/%/new-llada
	$(call learnt,$(STEPS),$*,$|)
$(RUNS)/%/ar/latest: | $(RUNS)/%/new-ar
	$(call learnt,$(STEPS),$*,$|)
$(RUNS)/%/dream/latest: | $(RUNS)/%/new-dream
	$(call learnt,$(QUARTER),$*9,$|)
$(RUNS)/judge/latest: | $(RUNS)/new-judge
	$(call learnt,$(STEPS),99,$|)
# After more training, on stories about sport alone.
$(RUNS)/%/tuned/latest: | $(RUNS)/%/llada/latest
	jq -c -n 'limit($(BATCH) * $(TUNING); inputs | select(.sentences[0].topic == "sport"))' $(RUNS)/stories.jsonl | \
	    $(call sft,$(TUNING),$*,$(RUNS)/$*/llada,3e-4)

# Sudokus with 1 to 4 holes; asked later with 8.
$(RUNS)/%/new-sudoku: | $(RUNS)
	dlmctl init $@ --family a2d --hidden-size 64 --layers 4 --heads 4 --gen-length 16 --block-length 16 --seed $*
$(RUNS)/%/sudoku/latest: | $(RUNS)/%/new-sudoku
	dlmctl prompts sudoku -n $$((128 * $(PUZZLING))) --holes 1-4 --completions --seed $*3 | dlmctl update -q --algo sft \
	    --lr 2e-3 --warmup 50 --schedule cosine --total-steps $(PUZZLING) --grad-norm 1 --fill-to 16 \
	    --prompts-per-step 128 -b 128 -m $| -o $(@D) > $(@D).jsonl
