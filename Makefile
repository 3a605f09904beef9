# G2SD: the paper's experiments as one graph of checkpoints. An interrupted reproduction goes on where it stopped.
#   make reproduce-table2 SCALE=imagenet IMAGENET=/data/imagenet     the paper's recipe, 8 GPUs
#   make reproduce-table2 SCALE=cifar10 CIFAR10=/data/cifar10        one GPU; a reduced form on a CPU
#   make reproduce-table2 SCALE=toy                                  drawn images, minutes on a CPU (make demo)
#   make reproduce-table3 SCALE=imagenet IMAGENET=... COCO=/data/coco  detection; every row whose start weights are given
#   make reproduce-ade20k SCALE=imagenet IMAGENET=... ADE20K=/data/ADEChallengeData2016  semantic segmentation
#   make reproduce-all SCALE=imagenet IMAGENET=... COCO=... ADE20K=... SEEDS="0 1 2"     every table, three times
#   make -n reproduce-table2 ...                                     shows every command

SCALE ?= imagenet
SEEDS ?= 0
OUT ?= runs
IMAGENET ?=
CIFAR10 ?=
COCO ?=
ADE20K ?=
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
DEVICE ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
# spinning OpenMP threads slow two processes on two cores twentyfold
export OMP_WAIT_POLICY ?= passive
ifeq ($(DEVICE),cpu)
export OMP_NUM_THREADS ?= 1
endif

RUNS := $(OUT)/$(SCALE)
# % is the seed: a row of a table is a run in each seed's folder, and all share the teachers
ROW := $(RUNS)/seed%
# your own checkpoints in place of the teachers that would be made
TEACHER_MAE ?= $(RUNS)/teacher_mae/final.pth
TEACHER_CLS ?= $(RUNS)/teacher_cls/final.pth
TEACHER_DET ?= $(RUNS)/teacher_det/final.pth
TEACHER_SEG ?= $(RUNS)/teacher_seg/final.pth
GENERIC ?= $(ROW)/generic/final.pth
# start weights of Table 3's other rows, files: DeiT-S and DeiT-S with distillation (300 epochs), DeiT-S (500), DINO-S, iBOT-S
DEIT ?=
DEIT_DISTILLED ?=
DEIT_500 ?=
DINO ?=
IBOT ?=

# ---- scales: sets of variables over one graph. Empty means: the scripts' defaults, which are the paper's
ifeq ($(SCALE),imagenet)
NPROC ?= 8
DATA := $(IMAGENET)
MAE_TEACHER := mae_vit_base_patch16
MAE_STUDENT := mae_vit_small_patch16_dec256d4b
OTHER_LAYERS := 2 6 8
# MAE's recipe for fine-tuning ViT-B
TEACHER_CLS_ARGS := --epochs 100 --blr 5e-4 --layer_decay 0.65 --drop_path 0.1
COCO_DATA := $(COCO)
# ViTDet-B's recipe
TEACHER_DET_ARGS := --weight_decay 0.1
ADE_DATA := $(ADE20K)
# for ViT-B, 16 images
TEACHER_SEG_ARGS := --lr 1e-4 --layer_decay 0.65 --batch_size 2
else ifeq ($(SCALE),cifar10)
NPROC ?= 1
COMMON := --device $(DEVICE) --input_size 32 --num_workers 8
ifeq ($(DEVICE),cuda)
DATA := $(CIFAR10)
COMMON += $(if $(wildcard $(CIFAR10)/cifar-10-batches-py),--data_set CIFAR10)
MAE_TEACHER := mae_vit_tiny_patch4_dec128d4b
MAE_STUDENT := mae_vit_micro_patch4_dec64d4b
OTHER_LAYERS := 1 3 4
MAE_ARGS := --batch_size 512 --accum_iter 1 --lr 1.5e-3
TEACHER_MAE_ARGS := --epochs 800
GENERIC_ARGS := --target_layer 2 --epochs 300
STAGE2_ARGS := --batch_size 512 --eval_every 10
else
# 4,000 training images, all test images; see README, "Results", for how the recipe was chosen
IMAGES ?= 400
DATA := $(RUNS)/data
COMMON := --device $(DEVICE) --input_size 32 --num_workers 0
MAE_TEACHER := mae_vit_nano_patch4_dec64d2b
MAE_STUDENT := mae_vit_pico_patch4_dec32d2b
OTHER_LAYERS := 2
MAE_ARGS := --batch_size 128 --accum_iter 1 --lr 1e-3 --target_layer 1
TEACHER_MAE_ARGS := --epochs 150 --warmup_epochs 8
GENERIC_ARGS := --epochs 90 --warmup_epochs 4
STAGE2_ARGS := --batch_size 128 --lr 4e-3 --aa none --reprob 0 --mixup 0 --cutmix 0 --eval_every 15
TEACHER_CLS_ARGS := --epochs 90 --lr 2e-3
FINETUNE_ARGS := --epochs 60
SCRATCH_ARGS := --epochs 150
endif
else ifeq ($(SCALE),toy)
NPROC ?= $(if $(filter cuda,$(DEVICE)),1,2)
DATA := $(RUNS)/data/imagenet
TOY_ARGS := --size 32 --only imagenet
COMMON := --device $(DEVICE) --input_size 32 --num_workers 0 --lr 2e-3 --warmup_epochs 3
MAE_TEACHER := mae_vit_nano_patch8_dec64d2b
MAE_STUDENT := mae_vit_pico_patch8_dec32d2b
OTHER_LAYERS := 2
MAE_ARGS := --batch_size 32 --accum_iter 1 --target_layer 1
STAGE2_ARGS := --batch_size 32 --aa none --reprob 0 --mixup 0 --cutmix 0 --eval_every 8
TEACHER_MAE_ARGS := --epochs 40
TEACHER_CLS_ARGS := --epochs 32
GENERIC_ARGS := --epochs 20
FINETUNE_ARGS := --epochs 20
SCRATCH_ARGS := --epochs 40
COCO_DATA := $(RUNS)/data/coco
ADE_DATA := $(RUNS)/data/ade
TOY_SCENES := --scenes 256 --val_scenes 64
# a few minutes; AP goes on rising for thousands of iterations
DET_ITERATIONS ?= 500
TEACHER_DET_ITERATIONS ?= 800
DET_ARGS := --device $(DEVICE) --num_workers 0 --input_size 64 --window_size 4 --fpn_dim 32 --head_dim 128 --anchor_size 6 \
	--proposals 50 --roi_batch 32 --drop_path 0 --scale_jitter 0.7 1.4 --batch_size 4 --lr 2e-3 --warmup_iterations 50 \
	--distill_warmup 100 --iterations $(DET_ITERATIONS) --eval_every 250
TEACHER_DET_ARGS := --iterations $(TEACHER_DET_ITERATIONS)
SEG_ITERATIONS ?= 800
SEG_ARGS := --device $(DEVICE) --num_workers 0 --input_size 64 --batch_size 4 --lr 5e-3 --drop_path 0 --ratio_range 0.75 1.5 \
	--warmup_iterations 20 --iterations $(SEG_ITERATIONS) --eval_every 400
else
$(error SCALE=$(SCALE): choose imagenet, cifar10 or toy)
endif
strip_decoder = $(firstword $(subst _dec, ,$(patsubst mae_%,%,$(1))))
CLS_TEACHER := $(call strip_decoder,$(MAE_TEACHER))
CLS_STUDENT := $(call strip_decoder,$(MAE_STUDENT))

RUN = $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(NPROC)
STAGE1 = $(RUN) generic_distill.py --data_path $(DATA) --output_dir $(@D) --resume auto $(COMMON) $(MAE_ARGS)
STAGE2 = $(RUN) specific_distill_cls.py --data_path $(DATA) --output_dir $(@D) --resume auto $(COMMON) $(STAGE2_ARGS)
DET = $(RUN) specific_distill_det.py --data_path $(COCO_DATA) --output_dir $(@D) --resume auto $(DET_ARGS)
SEG = $(RUN) specific_distill_seg.py --data_path $(ADE_DATA) --output_dir $(@D) --resume auto $(SEG_ARGS)
# final.pth appears when all epochs are done; checkpoint.pth of an interrupted run is what --resume auto goes on from
# a run that a signal stopped ends without an error, too: the last line of its log tells
FINISHED = $(PYTHON) -c 'import json, sys; args = json.load(open("$(@D)/args.json")); \
	last = json.loads((open("$(@D)/log.txt").read().splitlines() or ["{}"])[-1]); \
	sys.exit(0 if last.get("iteration", -1) == args.get("iterations") or last.get("epoch", -2) + 1 == args.get("epochs") \
	else "$(@D) was interrupted: start make again, it goes on")'
FINISH = $(FINISHED) && ln -f $(@D)/checkpoint.pth $@ && touch $@

# ---- which rows make a table
TARGETS := recon recon_gt
MASK_RATIOS := 0.05 0.25 0.55 0.9
DET_STARTS := $(foreach name,DEIT DEIT_DISTILLED DEIT_500 DINO IBOT,$(if $($(name)),$(name)))
det_folder = det_$(shell echo $(1) | tr A-Z a-z)
reproduce-table2-rows := deit deit_distilled finetuned g2sd
reproduce-table3-rows := det_finetuned det_g2sd $(foreach name,$(DET_STARTS),$(call det_folder,$(name)))
reproduce-table4-rows := finetuned g2sd $(foreach target,$(TARGETS),finetuned_$(target) g2sd_$(target))
reproduce-table5-rows := finetuned $(MASK_RATIOS:%=finetuned_mask%) $(OTHER_LAYERS:%=finetuned_layer%)
reproduce-ade20k-rows := seg_finetuned seg_g2sd
ALL := reproduce-table2 reproduce-table4 reproduce-table5 $(if $(filter cifar10,$(SCALE)),,reproduce-table3 reproduce-ade20k)
reproduce-all-rows := $(foreach table,$(ALL),$($(table)-rows))
WANTED := $(filter reproduce-%,$(MAKECMDGOALS))
FINALS := $(sort $(foreach seed,$(SEEDS),$(foreach table,$(WANTED),$($(table)-rows:%=$(RUNS)/seed$(seed)/%/final.pth))))

# what is missing is said before anything is trained
ifneq ($(WANTED),)
$(foreach name,TEACHER_MAE TEACHER_CLS TEACHER_DET TEACHER_SEG GENERIC,$(if $(filter-out file,$(origin $(name))),\
	$(if $(wildcard $($(name))),,$(error $(name)=$($(name)): there is no such file; give a local path))))
endif
ifneq ($(filter reproduce-table3 reproduce-ade20k,$(WANTED)),)
ifeq ($(SCALE),cifar10)
$(error SCALE=cifar10 has no detection and no segmentation: choose imagenet or toy)
endif
endif
ifneq ($(filter $(if $(filter cifar10,$(SCALE)),,reproduce-all) reproduce-table3,$(WANTED)),)
ifeq ($(SCALE)-$(wildcard $(COCO_DATA)/annotations),imagenet-)
$(error set COCO=folder with annotations/, train2017/ and val2017/)
endif
$(foreach name,$(DET_STARTS),$(if $(wildcard $($(name))),,$(error $(name)=$($(name)): there is no such file)))
endif
ifneq ($(filter $(if $(filter cifar10,$(SCALE)),,reproduce-all) reproduce-ade20k,$(WANTED)),)
ifeq ($(SCALE)-$(wildcard $(ADE_DATA)/annotations),imagenet-)
$(error set ADE20K=folder with images/ and annotations/, each with training/ and validation/)
endif
endif

.PHONY: help demo test test-fuzz test-kills lint diff results clean data coco ade bench bench-growth \
	reproduce-table2 reproduce-table3 reproduce-table4 reproduce-table5 reproduce-ade20k reproduce-all
.DELETE_ON_ERROR:
# stage 1's checkpoints are kept
.SECONDARY:

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20
	@echo 'variables:          SCALE=imagenet|cifar10|toy SEEDS="0 1 2" NPROC=8 IMAGENET= CIFAR10= COCO= ADE20K= OUT=runs,'
	@echo '                    your own checkpoints: TEACHER_MAE= TEACHER_CLS= TEACHER_DET= TEACHER_SEG= GENERIC= DEIT= ... (see Makefile)'

reproduce-table2: results  ## G2SD against DeiT with distillation and DeiT, at equal total epochs: train every row, print the table
reproduce-table3: results  ## detection and instance segmentation on COCO
reproduce-table4: results  ## the targets of stage 1: features, reconstructions, and these with the true pixels
reproduce-table5: results  ## mask ratios of stage 1, and the teacher's decoder block
reproduce-ade20k: results  ## semantic segmentation
reproduce-all: results  ## all tables; at SCALE=cifar10 those of classification

# four images, spread over a folder
FOUR = $$(find -L $(1) -type f | sort | awk '{name[NR] = $$0} END {for (i = 0; i < 4; i++) print name[int(NR * i / 4) + 1]}')
SEED_1 = $(RUNS)/seed$(firstword $(SEEDS))
results: $(FINALS)  ## print the tables of what has been run at this SCALE, and draw curves and pictures
	@if test -f $(SEED_1)/generic/final.pth && test -d "$(DATA)/val"; then $(PYTHON) tools/visualize.py \
		--checkpoint $(SEED_1)/generic/final.pth --out $(RUNS)/stage1.png --images $(call FOUR,$(DATA)/val) || echo "no picture of stage 1"; fi
	@if test -f $(SEED_1)/det_g2sd/final.pth && test -d "$(COCO_DATA)/val2017"; then $(PYTHON) tools/predict.py --checkpoint $(SEED_1)/det_g2sd/final.pth \
		--out $(RUNS)/detection.png --image $$(printf '%s\n' $(call FOUR,$(COCO_DATA)/val2017) | tail -n 1) || echo "no picture of detection"; fi
	@if test -f $(SEED_1)/seg_g2sd/final.pth && test -d "$(ADE_DATA)/images/validation"; then $(PYTHON) tools/predict.py --checkpoint $(SEED_1)/seg_g2sd/final.pth \
		--out $(RUNS)/segmentation.png --image $$(printf '%s\n' $(call FOUR,$(ADE_DATA)/images/validation) | tail -n 1) || echo "no picture of segmentation"; fi
	$(PYTHON) tools/results.py $(RUNS)

# ---- the teachers: each is made once, for all tables and seeds
$(RUNS)/teacher_mae/final.pth: | data
	$(STAGE1) --seed 0 --target pixel --model $(MAE_TEACHER) $(TEACHER_MAE_ARGS)
	$(FINISH)

$(RUNS)/teacher_cls/final.pth: $(TEACHER_MAE) | data
	$(STAGE2) --seed 0 --model $(CLS_TEACHER) --finetune $< $(TEACHER_CLS_ARGS)
	$(FINISH)

$(RUNS)/teacher_det/final.pth: $(TEACHER_MAE) | coco
	$(DET) --seed 0 --model $(CLS_TEACHER) --finetune $< $(TEACHER_DET_ARGS)
	$(FINISH)

$(RUNS)/teacher_seg/final.pth: $(TEACHER_MAE) | ade
	$(SEG) --seed 0 --model $(CLS_TEACHER) --finetune $< $(TEACHER_SEG_ARGS)
	$(FINISH)

# ---- Table 2
$(ROW)/generic/final.pth: $(TEACHER_MAE) | data
	$(STAGE1) --seed $* --teacher_model $(MAE_TEACHER) --teacher_path $< --model $(MAE_STUDENT) $(GENERIC_ARGS)
	$(FINISH)

$(ROW)/finetuned/final.pth: $(GENERIC) | data
	$(STAGE2) --seed $* --model $(CLS_STUDENT) --finetune $< $(FINETUNE_ARGS)
	$(FINISH)

$(ROW)/g2sd/final.pth: $(GENERIC) $(TEACHER_CLS) | data
	$(STAGE2) --seed $* --model $(CLS_STUDENT) --finetune $< \
		--teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_CLS) $(FINETUNE_ARGS)
	$(FINISH)

$(ROW)/deit_distilled/final.pth: $(TEACHER_CLS) | data
	$(STAGE2) --seed $* --model $(CLS_STUDENT) --teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_CLS) $(SCRATCH_ARGS)
	$(FINISH)

$(ROW)/deit/final.pth: | data
	$(STAGE2) --seed $* --model $(CLS_STUDENT) $(SCRATCH_ARGS)
	$(FINISH)

# ---- Tables 4 and 5: stage 1 with other flags, $(2), then both kinds of stage 2
define variant
$(ROW)/generic_$(1)/final.pth: $(TEACHER_MAE) | data
	$$(STAGE1) --seed $$* --teacher_model $(MAE_TEACHER) --teacher_path $$< --model $(MAE_STUDENT) $(GENERIC_ARGS) $(2)
	$$(FINISH)

$(ROW)/finetuned_$(1)/final.pth: $(ROW)/generic_$(1)/final.pth | data
	$$(STAGE2) --seed $$* --model $(CLS_STUDENT) --finetune $$< $(FINETUNE_ARGS)
	$$(FINISH)

$(ROW)/g2sd_$(1)/final.pth: $(ROW)/generic_$(1)/final.pth $(TEACHER_CLS) | data
	$$(STAGE2) --seed $$* --model $(CLS_STUDENT) --finetune $$< \
		--teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_CLS) $(FINETUNE_ARGS)
	$$(FINISH)
endef
$(foreach target,$(TARGETS),$(eval $(call variant,$(target),--target $(target))))
$(foreach ratio,$(MASK_RATIOS),$(eval $(call variant,mask$(ratio),--mask_ratio $(ratio))))
$(foreach layer,$(OTHER_LAYERS),$(eval $(call variant,layer$(layer),--target_layer $(layer))))

# ---- Table 3
$(ROW)/det_finetuned/final.pth: $(GENERIC) | coco
	$(DET) --seed $* --model $(CLS_STUDENT) --finetune $<
	$(FINISH)

$(ROW)/det_g2sd/final.pth: $(GENERIC) $(TEACHER_DET) | coco
	$(DET) --seed $* --model $(CLS_STUDENT) --finetune $< --teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_DET)
	$(FINISH)

define det_start
$(ROW)/$(call det_folder,$(1))/final.pth: $($(1)) | coco
	$$(DET) --seed $$* --model $(CLS_STUDENT) --finetune $$<
	$$(FINISH)
endef
$(foreach name,$(DET_STARTS),$(eval $(call det_start,$(name))))

# ---- ADE20K
$(ROW)/seg_finetuned/final.pth: $(GENERIC) | ade
	$(SEG) --seed $* --model $(CLS_STUDENT) --finetune $<
	$(FINISH)

$(ROW)/seg_g2sd/final.pth: $(GENERIC) $(TEACHER_SEG) | ade
	$(SEG) --seed $* --model $(CLS_STUDENT) --finetune $< --teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_SEG)
	$(FINISH)

# ---- data: checked for the real sets, drawn for the toy, thinned out for a CPU
ifeq ($(SCALE),toy)
data: $(RUNS)/data/imagenet
$(RUNS)/data/imagenet:
	$(PYTHON) tools/toy_data.py --out $(RUNS)/data $(TOY_ARGS)
else ifeq ($(SCALE)-$(DEVICE),cifar10-cpu)
data: $(RUNS)/data/val
$(RUNS)/data/val:
	@test -d "$(CIFAR10)/train" || { echo 'set CIFAR10=folder with train/CLASS/ and val/CLASS/'; exit 1; }
	@mkdir -p $(RUNS)/data/train
	@for class in $(CIFAR10)/train/*/; do name=$$(basename $$class); mkdir -p $(RUNS)/data/train/$$name; \
		ls $$class | sort | head -n $(IMAGES) | while read file; do \
		ln -sf $(abspath $(CIFAR10))/train/$$name/$$file $(RUNS)/data/train/$$name/$$file; done; done
	ln -sfn $(abspath $(CIFAR10))/val $@
else
data:
	@test -d "$(DATA)" || { echo 'set $(if $(filter imagenet,$(SCALE)),IMAGENET=folder with train/CLASS/ and val/CLASS/,CIFAR10=folder)'; exit 1; }
endif

ifeq ($(SCALE),toy)
coco: $(ADE_DATA)
ade: $(ADE_DATA)
$(ADE_DATA): | data
	$(PYTHON) tools/toy_data.py --out $(RUNS)/data --only coco ade $(TOY_SCENES)
else
coco:
ade:
endif

# ---- a fresh machine needs Python and make only
VENV := .venv/bin/python
.venv/installed: requirements.txt requirements-dev.txt
	python3 -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed  ## install into .venv, draw toy data, run Table 2 in miniature on this CPU
	$(MAKE) reproduce-table2 SCALE=toy DEVICE=cpu PYTHON=$(VENV) OUT=$(OUT)
	$(VENV) tools/predict.py --checkpoint $(OUT)/toy/seed$(firstword $(SEEDS))/g2sd/final.pth \
		--image $$(find $(OUT)/toy/data/imagenet/val -name '*.png' | sort | head -n 1)
	@echo 'one page with the table and pictures: $(OUT)/toy/results.md'

test: .venv/installed lint  ## install into .venv, lint, and run all tests
	$(VENV) -m pytest -q --durations=10 tests

# how many times the inputs that `make test` draws
FUZZ ?= 20
test-fuzz: .venv/installed  ## draw FUZZ times as many nonsense arguments, files and annotations as `test` does, and count them
	FUZZ=$(FUZZ) $(VENV) -m pytest -q -s tests/test_fuzz.py

KILLS ?= 100
test-kills: .venv/installed  ## kill a toy run KILLS=100 times at random, resume it, compare its bits (`make test`: 5 times)
	KILLS=$(KILLS) $(VENV) -m pytest -q tests/test_kills.py

lint: .venv/installed  ## mistakes only: unused names, shadowing, common bugs
	$(VENV) -m ruff check --isolated --line-length 125 --select E4,E5,E7,E9,F,B,A,PLE --ignore B905 .

# ---- speed: the result is a line of JSON in bench.json and a row of the table. On a CPU smaller batches, on all of its cores
BENCH_DATA ?=
BENCH_ARGS ?=
BENCH_WORDS = tools/benchmark.py --json $(OUT)/bench.json --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--num_workers 0)
BENCH = $(if $(filter cpu,$(DEVICE)),OMP_NUM_THREADS=$(shell nproc)) $(PYTHON) $(BENCH_WORDS)
BENCH_IMAGES = $(if $(BENCH_DATA),--data_path $(BENCH_DATA))
BENCH_CLS = $(BENCH) $(BENCH_IMAGES)
bench_size = $(if $(filter cpu,$(DEVICE)),$(1),$(2))
bench:  ## images/s of every stage: loader, step, both, and the gain over a plain way; BENCH_DATA=IMAGENET BENCH_ARGS="--compile"
	@mkdir -p $(OUT)
	$(BENCH_CLS) --stage generic --accum_iter 1 $(call bench_size,--batch_size 16 --steps 2,--steps 20) $(BENCH_ARGS)
	$(BENCH_CLS) --stage cls $(call bench_size,--batch_size 8 --steps 1,--steps 20) $(BENCH_ARGS)
	$(BENCH) --stage det $(call bench_size,--input_size 512 --batch_size 2 --steps 1 --turns 3,--steps 5) $(BENCH_ARGS)
	$(BENCH) --stage seg $(call bench_size,--batch_size 2 --steps 1 --turns 3,--steps 10) $(BENCH_ARGS)
	$(PYTHON) tools/benchmark.py --table $(OUT)/bench.json

GROW_WORDS = $(BENCH_IMAGES) --stage generic --no-plain --accum_iter 1 --steps 2 --turns 3 $(BENCH_ARGS)
GROW = $(BENCH) $(GROW_WORDS)
bench-growth:  ## stage 1: images/s against batch size, input size, workers and processes
	@mkdir -p $(OUT)
	for size in $(call bench_size,1 4 16 64,32 64 128 256 512); do $(GROW) --batch_size $$size || exit 1; done
	for size in 112 224 448; do $(GROW) --batch_size $(call bench_size,8,64) --input_size $$size || exit 1; done
	for count in $(call bench_size,0 1 2 4,0 2 4 8 16); do $(GROW) --batch_size $(call bench_size,8,256) --num_workers $$count || exit 1; done
	for count in $(call bench_size,1 2,1 2 4 8); do $(if $(filter cpu,$(DEVICE)),OMP_NUM_THREADS=1) $(PYTHON) -m torch.distributed.run \
		--standalone --nproc_per_node=$$count $(BENCH_WORDS) $(GROW_WORDS) --batch_size $(call bench_size,8,256) || exit 1; done
	$(PYTHON) tools/benchmark.py --table $(OUT)/bench.json

diff:  ## what the stages do differently
	-diff generic_distill.py specific_distill_cls.py
	-diff specific_distill_cls.py specific_distill_det.py
	-diff specific_distill_det.py specific_distill_seg.py

clean:  ## remove caches; never runs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis
