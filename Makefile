# G2SD: the paper's experiments as one graph of checkpoints; an interrupted one goes on.
#   make reproduce-table2 IMAGENET=/data/imagenet                the paper's recipe, 8 GPUs
#   make reproduce-table2 SCALE=cifar10 CIFAR10=/data/cifar10    one GPU; a reduced form on a CPU
#   make reproduce-table2 SCALE=toy                              drawn images, minutes on a CPU
#   make reproduce-all IMAGENET=... COCO=... ADE20K=... SEEDS="0 1 2"    every table, three times
#   make -n reproduce-table2 ...                                 shows every command

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
# your own checkpoints in place of the teachers, and of stage 1, that would be made
TEACHER_MAE ?= $(RUNS)/teacher_mae/final.pth
TEACHER_CLS ?= $(RUNS)/teacher_cls/final.pth
TEACHER_DET ?= $(RUNS)/teacher_det/final.pth
TEACHER_SEG ?= $(RUNS)/teacher_seg/final.pth
GENERIC ?= $(ROW)/generic/final.pth
# start weights that make another row of Table 3 each: DeiT-S of 300 epochs, without and with
# distillation, and of 500; DINO-S, iBOT-S
STARTS := DEIT DEIT_DISTILLED DEIT_500 DINO IBOT
OWN := TEACHER_MAE TEACHER_CLS TEACHER_DET TEACHER_SEG GENERIC $(STARTS)
GIVEN := $(foreach name,$(OWN),$(if $(filter command environment,$(origin $(name))),$(name)))
$(foreach name,$(GIVEN),$(if $(wildcard $($(name))),,\
	$(error $(name)=$($(name)): there is no such file; give a local path without spaces)))
$(if $(word 2,$(OUT)),$(error OUT=$(OUT): a path with spaces does not work here, choose another))

# ---- scales: sets of variables over one graph. Empty means the scripts' defaults, the paper's
ifeq ($(SCALE),imagenet)
NPROC ?= 8
DATA := $(IMAGENET)
MAE_TEACHER := mae_vit_base_patch16
MAE_STUDENT := mae_vit_small_patch16_dec256d4b
OTHER_LAYERS := 2 6 8
# MAE's recipe for fine-tuning ViT-B
TEACHER_CLS_ARGS := --epochs 100 --blr 5e-4 --layer_decay 0.65 --drop_path 0.1
# for ViT-B, 16 images
TEACHER_SEG_ARGS := --lr 1e-4 --layer_decay 0.65 --batch_size 2
else ifeq ($(SCALE)-$(DEVICE),cifar10-cuda)
NPROC ?= 1
DATA := $(CIFAR10)
# torchvision's files in place of folders
CIFAR10_FILES := $(shell test -d "$(CIFAR10)/cifar-10-batches-py" && echo yes)
COMMON := --input_size 32 --num_workers 8 $(if $(CIFAR10_FILES),--data_set CIFAR10)
MAE_TEACHER := mae_vit_tiny_patch4_dec128d4b
MAE_STUDENT := mae_vit_micro_patch4_dec64d4b
OTHER_LAYERS := 1 3 4
MAE_ARGS := --batch_size 512 --accum_iter 1 --lr 1.5e-3
TEACHER_MAE_ARGS := --epochs 800
GENERIC_ARGS := --epochs 300
STAGE2_ARGS := --batch_size 512 --eval_every 10
else ifeq ($(SCALE),cifar10)
# 4,000 training images, all test images
IMAGES ?= 400
NPROC ?= 1
DATA := $(RUNS)/data
COMMON := --input_size 32 --num_workers 0
MAE_TEACHER := mae_vit_nano_patch4_dec64d2b
MAE_STUDENT := mae_vit_pico_patch4_dec32d2b
OTHER_LAYERS := 2
MAE_ARGS := --batch_size 128 --accum_iter 1 --lr 1e-3
TEACHER_MAE_ARGS := --epochs 150 --warmup_epochs 8
GENERIC_ARGS := --epochs 90 --warmup_epochs 4
# Table 1's mixing: without it the teacher says what the labels say
STAGE2_ARGS := --batch_size 128 --lr 4e-3 --aa none --reprob 0 --eval_every 30
TEACHER_CLS_ARGS := --epochs 120 --lr 2e-3
FINETUNE_ARGS := --epochs 120
SCRATCH_ARGS := --epochs 210
else ifeq ($(SCALE),toy)
NPROC ?= $(if $(filter cuda,$(DEVICE)),1,2)
DATA := $(RUNS)/data/imagenet
override COCO := $(RUNS)/data/coco
override ADE20K := $(RUNS)/data/ade
COMMON := --input_size 32 --num_workers 0 --lr 2e-3 --warmup_epochs 3
MAE_TEACHER := mae_vit_nano_patch8_dec64d2b
MAE_STUDENT := mae_vit_pico_patch8_dec32d2b
OTHER_LAYERS := 2
MAE_ARGS := --batch_size 32 --accum_iter 1
TEACHER_MAE_ARGS := --epochs 40
GENERIC_ARGS := --epochs 20
STAGE2_ARGS := --batch_size 32 --aa none --reprob 0 --mixup 0 --cutmix 0 --eval_every 8
TEACHER_CLS_ARGS := --epochs 32
FINETUNE_ARGS := --epochs 20
SCRATCH_ARGS := --epochs 40
# a few minutes; AP goes on rising for thousands of iterations
DET_ITERATIONS ?= 500
TEACHER_DET_ITERATIONS ?= 800
DET_ARGS := --num_workers 0 --input_size 64 --window_size 4 --fpn_dim 32 \
	--head_dim 128 --anchor_size 6 --proposals 50 --roi_batch 32 --drop_path 0 \
	--scale_jitter 0.7 1.4 --batch_size 4 --lr 2e-3 --warmup_iterations 50 --distill_warmup 100 \
	--iterations $(DET_ITERATIONS) --eval_every 250
TEACHER_DET_ARGS := --iterations $(TEACHER_DET_ITERATIONS)
SEG_ITERATIONS ?= 800
SEG_ARGS := --num_workers 0 --input_size 64 --batch_size 4 --lr 5e-3 \
	--drop_path 0 --ratio_range 0.75 1.5 --warmup_iterations 20 --iterations $(SEG_ITERATIONS) \
	--eval_every 400
else
$(error SCALE=$(SCALE): choose imagenet, cifar10 or toy)
endif
strip_decoder = $(firstword $(subst _dec, ,$(1:mae_%=%)))
TEACHER := $(call strip_decoder,$(MAE_TEACHER))
STUDENT := $(call strip_decoder,$(MAE_STUDENT))

# ---- which rows make a table
TARGETS := recon recon_gt
MASK_RATIOS := 0.05 0.25 0.55 0.9
det_start = det_$(shell echo $(1) | tr A-Z a-z)
reproduce-table2-rows := deit deit_distilled finetuned g2sd
reproduce-table3-rows := det_finetuned det_g2sd \
	$(foreach name,$(filter $(STARTS),$(GIVEN)),$(call det_start,$(name)))
reproduce-table4-rows := finetuned g2sd $(TARGETS:%=finetuned_%) $(TARGETS:%=g2sd_%)
reproduce-table5-rows := finetuned $(patsubst %,finetuned_%,\
	$(MASK_RATIOS:%=mask%) $(OTHER_LAYERS:%=layer%))
reproduce-ade20k-rows := seg_finetuned seg_g2sd
TABLES := table2 table4 table5 $(if $(filter-out cifar10,$(SCALE)),table3 ade20k)
reproduce-all-rows := $(foreach table,$(TABLES),$(reproduce-$(table)-rows))
ROWS := $(sort $(foreach goal,$(MAKECMDGOALS),$($(goal)-rows)))
FINALS := $(foreach seed,$(SEEDS),$(ROWS:%=$(RUNS)/seed$(seed)/%/final.pth))

.PHONY: help demo test lint results diff bench gpu clean data coco ade reproduce-all reproduce-ade20k \
	reproduce-table2 reproduce-table3 reproduce-table4 reproduce-table5
# stage 1's checkpoints are kept
.SECONDARY:

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20
	@echo 'variables:          SCALE=imagenet|cifar10|toy SEEDS="0 1 2" NPROC=8 OUT=runs'
	@echo '                    data: IMAGENET= CIFAR10= COCO= ADE20K='
	@echo '                    own checkpoints: $(OWN:%=%=)'

reproduce-table2: results  ## G2SD against DeiT with and without distillation: all rows, the table
reproduce-table3: results  ## detection and instance segmentation on COCO
reproduce-table4: results  ## targets of stage 1: features, reconstructions, these and true pixels
reproduce-table5: results  ## mask ratios of stage 1, and the teacher's decoder block
reproduce-ade20k: results  ## semantic segmentation
reproduce-all: results  ## all tables; at SCALE=cifar10 those of classification

results: $(FINALS)  ## tables of what has been run at this SCALE, curves and pictures
	$(PYTHON) tools/results.py $(RUNS)

# $(1): script and data, $(2): its flags. A run that a signal stopped ends without an error, but makes
# no final.pth: started again, it goes on from checkpoint.pth
define train
$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(NPROC) $(1) \
	--output_dir $(@D) --resume auto --device $(DEVICE) $(2)
$(PYTHON) tools/results.py --finished $(@D) && ln -f $(@D)/checkpoint.pth $@
endef
STAGE1 = $(call train,generic_distill.py --data_path "$(DATA)",$(COMMON) $(MAE_ARGS) $(1))
STAGE2 = $(call train,specific_distill_cls.py --data_path "$(DATA)",$(COMMON) $(STAGE2_ARGS) $(1))
DET = $(call train,specific_distill_det.py --data_path "$(COCO)",$(DET_ARGS) $(1))
SEG = $(call train,specific_distill_seg.py --data_path "$(ADE20K)",$(SEG_ARGS) $(1))

# ---- the teachers: each is made once, for all tables and seeds
TUNE_TEACHER = --seed 0 --model $(TEACHER) --finetune $<
$(RUNS)/teacher_mae/final.pth: | data
	$(call STAGE1,--seed 0 --target pixel --model $(MAE_TEACHER) $(TEACHER_MAE_ARGS))
$(RUNS)/teacher_cls/final.pth: $(TEACHER_MAE) | data
	$(call STAGE2,$(TUNE_TEACHER) $(TEACHER_CLS_ARGS))
$(RUNS)/teacher_det/final.pth: $(TEACHER_MAE) | coco
	$(call DET,$(TUNE_TEACHER) $(TEACHER_DET_ARGS))
$(RUNS)/teacher_seg/final.pth: $(TEACHER_MAE) | ade
	$(call SEG,$(TUNE_TEACHER) $(TEACHER_SEG_ARGS))

# ---- Tables 2, 4, 5: stage 1 with the flags $(3), and both kinds of stage 2, which start from $(2)
TUNE = --seed $* --model $(STUDENT) --finetune $<
define stages
$(ROW)/generic$(1)/final.pth: $(TEACHER_MAE) | data
	$$(call STAGE1,--seed $$* --model $(MAE_STUDENT) --teacher_path $$< $(GENERIC_ARGS) $(3))
$(ROW)/finetuned$(1)/final.pth: $(2) | data
	$$(call STAGE2,$$(TUNE) $(FINETUNE_ARGS))
$(ROW)/g2sd$(1)/final.pth: $(2) $(TEACHER_CLS) | data
	$$(call STAGE2,$$(TUNE) --teacher_path $(TEACHER_CLS) $(FINETUNE_ARGS))
endef
variant = $(eval $(call stages,_$(1),$(ROW)/generic_$(1)/final.pth,$(2)))
$(eval $(call stages,,$(GENERIC),))
$(foreach target,$(TARGETS),$(call variant,$(target),--target $(target)))
$(foreach ratio,$(MASK_RATIOS),$(call variant,mask$(ratio),--mask_ratio $(ratio)))
$(foreach layer,$(OTHER_LAYERS),$(call variant,layer$(layer),--target_layer $(layer)))
$(ROW)/deit_distilled/final.pth: $(TEACHER_CLS) | data
	$(call STAGE2,--seed $* --model $(STUDENT) --teacher_path $< $(SCRATCH_ARGS))
$(ROW)/deit/final.pth: | data
	$(call STAGE2,--seed $* --model $(STUDENT) $(SCRATCH_ARGS))

# ---- Table 3, ADE20K
$(ROW)/det_finetuned/final.pth: $(GENERIC) | coco
	$(call DET,$(TUNE))
$(ROW)/det_g2sd/final.pth: $(GENERIC) $(TEACHER_DET) | coco
	$(call DET,$(TUNE) --teacher_path $(TEACHER_DET))
define start
$(ROW)/$(call det_start,$(1))/final.pth: $($(1)) | coco
	$$(call DET,$$(TUNE))
endef
$(foreach name,$(STARTS),$(eval $(call start,$(name))))
$(ROW)/seg_finetuned/final.pth: $(GENERIC) | ade
	$(call SEG,$(TUNE))
$(ROW)/seg_g2sd/final.pth: $(GENERIC) $(TEACHER_SEG) | ade
	$(call SEG,$(TUNE) --teacher_path $(TEACHER_SEG))

# ---- data: drawn for the toy; else what the tables need is looked for before anything is trained
need = @test -d "$($(1))/$(2)" || { echo 'set $(1)=folder with $(3)'; exit 1; }
ifeq ($(SCALE),toy)
data: $(DATA)
coco ade: $(ADE20K)
$(DATA):
	$(PYTHON) tools/toy_data.py --out $(RUNS)/data --only imagenet --size 32
$(ADE20K): | $(DATA)
	$(PYTHON) tools/toy_data.py --out $(RUNS)/data --only coco ade --scenes 256 --val_scenes 64
else ifeq ($(SCALE),imagenet)
data: $(if $(filter det_%,$(ROWS)),coco) $(if $(filter seg_%,$(ROWS)),ade)
	$(call need,IMAGENET,train,train/CLASS/ and val/CLASS/)
coco:
	$(call need,COCO,annotations,annotations/ train2017/ val2017/)
ade:
	$(call need,ADE20K,annotations,images/ and annotations/ of training/ and validation/)
else
$(if $(filter det_% seg_%,$(ROWS)),\
	$(error SCALE=cifar10 has no detection and no segmentation: choose imagenet or toy))
data: $(if $(filter cpu,$(DEVICE)),$(DATA)/val)
	$(call need,CIFAR10,$(if $(CIFAR10_FILES),.,train),train/CLASS/ and val/CLASS/)
# links to the first IMAGES of each class
$(RUNS)/data/val:
	$(call need,CIFAR10,train,train/CLASS/ and val/CLASS/)
	@root=$$(cd "$(CIFAR10)" && pwd) && for class in "$$root"/train/*/; do \
		links="$(DATA)/train/$$(basename "$$class")"; mkdir -p "$$links"; \
		ls "$$class" | head -n $(IMAGES) | while read -r file; do \
		ln -sf "$$class$$file" "$$links/$$file"; done; done && ln -sfn "$$root/val" $@
endif

# ---- a fresh machine needs Python and make only
VENV := .venv/bin/python
.venv/installed: requirements.txt requirements-dev.txt
	python3 -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed  ## install into .venv, draw toy data, run Table 2 in miniature on this CPU
	$(MAKE) reproduce-table2 SCALE=toy DEVICE=cpu PYTHON=$(VENV) OUT=$(OUT)
	@echo 'one page with the table and pictures: $(OUT)/toy/results.md'

test: .venv/installed lint  ## install into .venv, lint, and run all tests
	$(VENV) -m pytest -q --durations=10 tests

lint: .venv/installed  ## mistakes only: unused names, shadowing, common bugs
	$(VENV) -m ruff check --isolated --line-length 125 --select E4,E5,E7,E9,F,B,A,PLE --ignore B905 .

BENCH_ARGS ?=
BENCH_FILE ?= bench.json
# $(1): stage, $(2): what makes it small enough for a CPU, on all of whose cores it runs
bench = $(if $(filter cpu,$(DEVICE)),OMP_NUM_THREADS=$(shell nproc)) $(PYTHON) tools/benchmark.py \
	--stage $(1) --json $(OUT)/$(BENCH_FILE) --device $(DEVICE) \
	$(if $(filter cpu,$(DEVICE)),--num_workers 0 --warmup 1 $(2))
bench:  ## speed and memory of every stage, a line of JSON each; BENCH_ARGS="--compile"
	@mkdir -p $(OUT)
	$(call bench,generic,--batch_size 16 --accum_iter 1 --steps 2) $(BENCH_ARGS)
	$(call bench,cls,--batch_size 8 --steps 1) $(BENCH_ARGS)
	$(call bench,det,--input_size 512 --batch_size 2 --steps 1) $(BENCH_ARGS)
	$(call bench,seg,--batch_size 2 --steps 1) $(BENCH_ARGS)

gpu:  ## first on a new GPU, ten minutes: its tests, the speed of every stage, a table of it
ifeq ($(DEVICE),cpu)
	@echo 'make gpu: there is no GPU here'
else
	rm -f $(OUT)/gpu.json
	-$(PYTHON) -m pytest -q tests/test_gpu.py
	-$(MAKE) -i bench BENCH_FILE=gpu.json
	-$(MAKE) -i bench BENCH_FILE=gpu.json BENCH_ARGS=--compile
	$(PYTHON) tools/benchmark.py --table $(OUT)/gpu.json
endif

diff:  ## what the stages do differently
	-diff generic_distill.py specific_distill_cls.py
	-diff specific_distill_cls.py specific_distill_det.py
	-diff specific_distill_det.py specific_distill_seg.py

clean:  ## remove caches; never runs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache
