# G2SD: the paper's experiments as one graph of checkpoints. An interrupted reproduction goes on where it stopped.
#   make reproduce-table2 SCALE=imagenet IMAGENET=/data/imagenet     the paper's recipe, 8 GPUs
#   make reproduce-table2 SCALE=cifar10 CIFAR10=/data/cifar10        one GPU; a reduced form on a CPU
#   make reproduce-table2 SCALE=toy                                  drawn images, minutes on a CPU (make demo)
#   make reproduce-table3 SCALE=imagenet IMAGENET=... COCO=/data/coco  detection; every row whose start weights are given
#   make reproduce-ade20k SCALE=imagenet IMAGENET=... ADE20K=/data/ADEChallengeData2016  semantic segmentation
#   make -n reproduce-table2 ...                                     shows every command

SCALE ?= imagenet
SEED ?= 0
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
ROWS := $(RUNS)/seed$(SEED)
# your own checkpoints in place of the teachers that would be made
TEACHER_MAE ?= $(RUNS)/teacher_mae/final.pth
TEACHER_CLS ?= $(RUNS)/teacher_cls/final.pth
TEACHER_DET ?= $(RUNS)/teacher_det/final.pth
TEACHER_SEG ?= $(RUNS)/teacher_seg/final.pth
GENERIC ?= $(ROWS)/generic/final.pth
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
MAE_ARGS := --batch_size 128 --accum_iter 1 --lr 1e-3 --target_layer 1
TEACHER_MAE_ARGS := --epochs 150 --warmup_epochs 8
GENERIC_ARGS := --epochs 90 --warmup_epochs 4
STAGE2_ARGS := --batch_size 128 --lr 4e-3 --aa none --reprob 0 --mixup 0 --cutmix 0 --eval_every 15
TEACHER_CLS_ARGS := --epochs 90 --lr 2e-3
FINETUNE_ARGS := --epochs 60
SCRATCH_ARGS := --epochs 150
endif
else ifeq ($(SCALE),toy)
NPROC ?= 2
DATA := $(RUNS)/data/imagenet
TOY_ARGS := --size 32 --only imagenet
COMMON := --device $(DEVICE) --input_size 32 --num_workers 0 --lr 2e-3 --warmup_epochs 3
MAE_TEACHER := mae_vit_nano_patch8_dec64d2b
MAE_STUDENT := mae_vit_pico_patch8_dec32d2b
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
STAGE1 = $(RUN) generic_distill.py --data_path $(DATA) --output_dir $(@D) --resume auto --seed $(SEED) \
	$(COMMON) $(MAE_ARGS)
STAGE2 = $(RUN) specific_distill_cls.py --data_path $(DATA) --output_dir $(@D) --resume auto --seed $(SEED) \
	$(COMMON) $(STAGE2_ARGS)
DET = $(RUN) specific_distill_det.py --data_path $(COCO_DATA) --output_dir $(@D) --resume auto --seed $(SEED) \
	$(DET_ARGS)
SEG = $(RUN) specific_distill_seg.py --data_path $(ADE_DATA) --output_dir $(@D) --resume auto --seed $(SEED) \
	$(SEG_ARGS)
# final.pth appears when all epochs are done; checkpoint.pth of an interrupted run is what --resume auto goes on from
FINISH = ln -f $(@D)/checkpoint.pth $@ && touch $@

.PHONY: help demo test lint diff results clean reproduce-table2 reproduce-table3 reproduce-ade20k data coco ade
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20
	@echo 'variables:          SCALE=imagenet|cifar10|toy SEED=0 NPROC=8 IMAGENET= CIFAR10= COCO= ADE20K= OUT=runs,'
	@echo '                    your own checkpoints: TEACHER_MAE= TEACHER_CLS= TEACHER_DET= TEACHER_SEG= GENERIC= DEIT= ... (see Makefile)'

# ---- Table 2: G2SD against DeiT with distillation and DeiT, at equal total epochs
TABLE2 := finetuned g2sd deit_distilled deit
reproduce-table2: $(TABLE2:%=$(ROWS)/%/final.pth)  ## the paper's Table 2: train every row, print the table
	$(PYTHON) tools/results.py $(RUNS)

$(RUNS)/teacher_mae/final.pth: | data
	$(STAGE1) --seed 0 --target pixel --model $(MAE_TEACHER) $(TEACHER_MAE_ARGS)
	$(FINISH)

$(RUNS)/teacher_cls/final.pth: $(TEACHER_MAE) | data
	$(STAGE2) --seed 0 --model $(CLS_TEACHER) --finetune $(TEACHER_MAE) $(TEACHER_CLS_ARGS)
	$(FINISH)

$(ROWS)/generic/final.pth: $(TEACHER_MAE) | data
	$(STAGE1) --teacher_model $(MAE_TEACHER) --teacher_path $(TEACHER_MAE) --model $(MAE_STUDENT) $(GENERIC_ARGS)
	$(FINISH)

$(ROWS)/finetuned/final.pth: $(GENERIC) | data
	$(STAGE2) --model $(CLS_STUDENT) --finetune $(GENERIC) $(FINETUNE_ARGS)
	$(FINISH)

$(ROWS)/g2sd/final.pth: $(GENERIC) $(TEACHER_CLS) | data
	$(STAGE2) --model $(CLS_STUDENT) --finetune $(GENERIC) \
		--teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_CLS) $(FINETUNE_ARGS)
	$(FINISH)

$(ROWS)/deit_distilled/final.pth: $(TEACHER_CLS) | data
	$(STAGE2) --model $(CLS_STUDENT) --teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_CLS) $(SCRATCH_ARGS)
	$(FINISH)

$(ROWS)/deit/final.pth: | data
	$(STAGE2) --model $(CLS_STUDENT) $(SCRATCH_ARGS)
	$(FINISH)

# ---- Table 3: detection and instance segmentation on COCO
DET_STARTS := $(foreach name,DEIT DEIT_DISTILLED DEIT_500 DINO IBOT,$(if $($(name)),$(name)))
det_folder = det_$(shell echo $(1) | tr A-Z a-z)
TABLE3 := det_finetuned det_g2sd $(foreach name,$(DET_STARTS),$(call det_folder,$(name)))
ifneq ($(filter reproduce-table3,$(MAKECMDGOALS)),)
# before anything is trained
ifeq ($(SCALE),cifar10)
$(error SCALE=cifar10 has no detection: choose imagenet or toy)
else ifeq ($(SCALE)-$(wildcard $(COCO_DATA)/annotations),imagenet-)
$(error set COCO=folder with annotations/, train2017/ and val2017/)
endif
$(foreach name,$(DET_STARTS),$(if $(wildcard $($(name))),,$(error $(name)=$($(name)): there is no such file)))
endif
reproduce-table3: $(TABLE3:%=$(ROWS)/%/final.pth)  ## the paper's Table 3: train every row, print the table
	$(PYTHON) tools/results.py $(RUNS)

$(RUNS)/teacher_det/final.pth: $(TEACHER_MAE) | coco
	$(DET) --seed 0 --model $(CLS_TEACHER) --finetune $(TEACHER_MAE) $(TEACHER_DET_ARGS)
	$(FINISH)

$(ROWS)/det_finetuned/final.pth: $(GENERIC) | coco
	$(DET) --model $(CLS_STUDENT) --finetune $(GENERIC)
	$(FINISH)

$(ROWS)/det_g2sd/final.pth: $(GENERIC) $(TEACHER_DET) | coco
	$(DET) --model $(CLS_STUDENT) --finetune $(GENERIC) --teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_DET)
	$(FINISH)

define det_start
$(ROWS)/$(call det_folder,$(1))/final.pth: $($(1)) | coco
	$$(DET) --model $(CLS_STUDENT) --finetune $($(1))
	$$(FINISH)
endef
$(foreach name,$(DET_STARTS),$(eval $(call det_start,$(name))))

# ---- semantic segmentation on ADE20K
SEG_ROWS := seg_finetuned seg_g2sd
ifneq ($(filter reproduce-ade20k,$(MAKECMDGOALS)),)
ifeq ($(SCALE),cifar10)
$(error SCALE=cifar10 has no segmentation: choose imagenet or toy)
else ifeq ($(SCALE)-$(wildcard $(ADE_DATA)/annotations),imagenet-)
$(error set ADE20K=folder with images/ and annotations/, each with training/ and validation/)
endif
endif
reproduce-ade20k: $(SEG_ROWS:%=$(ROWS)/%/final.pth)  ## semantic segmentation: train every row, print the table
	$(PYTHON) tools/results.py $(RUNS)

$(RUNS)/teacher_seg/final.pth: $(TEACHER_MAE) | ade
	$(SEG) --seed 0 --model $(CLS_TEACHER) --finetune $(TEACHER_MAE) $(TEACHER_SEG_ARGS)
	$(FINISH)

$(ROWS)/seg_finetuned/final.pth: $(GENERIC) | ade
	$(SEG) --model $(CLS_STUDENT) --finetune $(GENERIC)
	$(FINISH)

$(ROWS)/seg_g2sd/final.pth: $(GENERIC) $(TEACHER_SEG) | ade
	$(SEG) --model $(CLS_STUDENT) --finetune $(GENERIC) --teacher_model $(CLS_TEACHER) --teacher_path $(TEACHER_SEG)
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

results:  ## print the tables of what has been run at this SCALE, and draw the curves
	$(PYTHON) tools/results.py $(RUNS)

# ---- a fresh machine needs Python and make only
VENV := .venv/bin/python
.venv/installed: requirements.txt requirements-dev.txt
	python3 -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed  ## install into .venv, draw toy data, run Table 2 in miniature on this CPU
	$(MAKE) reproduce-table2 SCALE=toy DEVICE=cpu PYTHON=$(VENV) OUT=$(OUT)
	$(VENV) tools/visualize.py --checkpoint $(OUT)/toy/seed$(SEED)/generic/final.pth --out $(OUT)/toy/stage1.png \
		--images $$(find $(OUT)/toy/data/imagenet/val -name '*.png' | sort | awk 'NR % 120 == 1' | head -n 4)
	$(VENV) tools/predict.py --checkpoint $(OUT)/toy/seed$(SEED)/g2sd/final.pth \
		--image $$(find $(OUT)/toy/data/imagenet/val -name '*.png' | sort | head -n 1)
	@echo 'table: $(OUT)/toy/results.md   pictures: $(OUT)/toy/curves.png $(OUT)/toy/stage1.png'

test: .venv/installed lint  ## install into .venv, lint, and run all tests
	$(VENV) -m pytest -q --durations=10 tests

lint: .venv/installed  ## mistakes only: unused names, shadowing, common bugs
	$(VENV) -m ruff check --isolated --line-length 125 --select E4,E5,E7,E9,F,B,A,PLE --ignore B905 .

diff:  ## what the stages do differently
	-diff generic_distill.py specific_distill_cls.py
	-diff specific_distill_cls.py specific_distill_det.py
	-diff specific_distill_det.py specific_distill_seg.py

clean:  ## remove caches; never runs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis
