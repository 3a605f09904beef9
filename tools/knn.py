"""k-NN accuracy of encoders on a labelled folder: whether stage 1 makes progress, without training.

Reads:  --checkpoint   one or more of generic_distill.py, e.g. all that --save_every kept; or other
                       encoders, as --finetune takes them (with --model)
        --data_path    train/CLASS/ and val/CLASS/; images are prepared as in stage 2's evaluation
Run:    python tools/knn.py --data_path IMAGENET --per_class 100 --checkpoint runs/checkpoint-*.pth
Prints a line per checkpoint, in the order of their epochs: a trend to watch, not a result.
"""
import argparse
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import specific_distill_cls


def load_encoder(path, name=None, input_size=None):
    """Checkpoint -> (encoder in eval mode, its epoch or -1); name and size override its own."""
    checkpoint = models.read_checkpoint(path)
    trained = models.own_args(checkpoint)
    name = name or trained.get('model')
    if name is None:
        raise SystemExit(f'{path} does not name its network: give --model, e.g. vit_base_patch16')
    name = re.sub('^mae_|_dec.*', '', name)
    model = models.create_vit(name, 0, input_size or trained.get('input_size', 224))
    models.load_pretrained(model, path)
    return model.eval(), checkpoint.get('epoch', -1)


@torch.no_grad()
def encode(model, dataset, args):
    """(mean patch token of every image, of unit length, (N, D); labels (N,)) on --device."""
    features, labels = [], []
    for images, part in DataLoader(dataset, args.batch_size, num_workers=args.num_workers):
        tokens = model.forward_features(models.normalise(images.to(args.device)))
        features.append(F.normalize(tokens[:, model.num_prefix_tokens:].mean(dim=1), dim=1))
        labels.append(part)
    return torch.cat(features), torch.cat(labels).to(args.device)


def knn_accuracy(train, train_labels, test, test_labels, k=20, tau=0.07):
    """Percent of test features (M, D) whose k nearest of train (N, D) vote for the right label.

    All have unit length. A neighbour's vote weighs exp(cosine / tau) (Wu et al., CVPR 2018; k and
    tau as in DINO). Labels from 0.
    """
    right, classes = 0, int(train_labels.max()) + 1
    for part, labels in zip(test.split(1000), test_labels.split(1000)):
        nearest = (part @ train.T).topk(min(k, len(train)), dim=1)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[nearest.indices], (nearest.values / tau).exp())
        right += (votes.argmax(dim=1) == labels).sum().item()
    return 100 * right / len(test)


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='k-NN accuracy of encoders on a labelled folder', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, nargs='+', help='paths or https URLs')
    parser.add_argument('--data_path', required=True, help='with train/CLASS/ and val/CLASS/')
    parser.add_argument('--per_class', type=int, help='training images a class; all unless given')
    parser.add_argument('--k', type=int, default=20, help='neighbours that vote')
    parser.add_argument('--model', help='name of the network, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+', help='pixels; its own, else 224')
    parser.add_argument('--batch_size', type=int, default=64, help='images at a time')
    parser.add_argument('--num_workers', type=int, default=0, help='data workers')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='cuda or cpu')
    return parser


def main(args):
    args.data_set, lines = 'folder', []
    train, val = (specific_distill_cls.open_dataset(args, split) for split in ('train', 'val'))
    if train.classes != val.classes:
        raise SystemExit(f'{args.data_path}: train/ and val/ hold different classes')
    targets = torch.tensor(train.targets)
    chosen = [(targets == k).nonzero()[:args.per_class, 0] for k in range(len(train.classes))]
    subset = Subset(train, torch.cat(chosen).tolist())
    for path in args.checkpoint:
        model, epoch = load_encoder(path, args.model, args.input_size)
        size = argparse.Namespace(input_size=model.patch_embed.img_size)
        train.transform = val.transform = specific_distill_cls.build_transform(size, is_train=False)
        model.to(args.device)
        accuracy = knn_accuracy(*encode(model, subset, args), *encode(model, val, args), args.k)
        lines.append((epoch, path, accuracy))
    for epoch, path, accuracy in sorted(lines):
        print(f'epoch {"unknown" if epoch < 0 else epoch}: k-NN top-1 {accuracy:.2f} %  {path}')
    print(f'{args.k} neighbours among {len(subset)} training images, {len(val)} test images, '
          f'{len(val.classes)} classes: chance is {100 / len(val.classes):.2f} %')


if __name__ == '__main__':
    main(get_args_parser().parse_args())
