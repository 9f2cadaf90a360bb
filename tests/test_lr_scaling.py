"""The rule against every row of the paper's tables."""

import pytest

from mmagvm import RULES, find_rule

# appendix A.5, tables 1 to 3, as printed there
TABLES = {
    ('SGD', 'COCO'): {32: '0.04', 256: '0.226', 512: '0.32', 1024: '0.452'},
    ('SGD', 'ADE20K'): {32: '0.01', 512: '0.113', 1024: '0.16', 2048: '0.226'},
    ('AdamW', 'COCO'): {
        32: '0.0002',
        256: '0.00098',
        512: '0.0012',
        1024: '0.0015',
    },
}


@pytest.mark.parametrize(
    'rule, batch_size, printed',
    [
        (rule, batch_size, printed)
        for rule, rows in TABLES.items()
        for batch_size, printed in rows.items()
    ],
)
def test_rule_gives_the_papers_rates(rule, batch_size, printed):
    lr = RULES[rule](batch_size)
    digits = len(printed.replace('.', '').lstrip('0'))
    # the paper cuts 0.4525 to 0.452: one unit of its last digit
    assert lr == pytest.approx(
        float(printed), rel=10.0 ** (1 - digits) / 2 + 0.002
    )


def test_rule_is_linear_below_the_knee():
    rule = RULES['SGD', 'COCO']
    assert rule(16) == 0.02
    assert rule(8) == 0.01
    assert rule(128) == 0.16


@pytest.mark.parametrize(
    'optimizer, dataset, base_lr',
    [
        ('SGD', 'CocoDataset', 0.02),
        ('SGD', 'CustomDataset', 0.02),
        ('SGD', 'ADE20KDataset', 0.01),
        ('AdamW', 'CocoPanopticDataset', 2e-4),
    ],
)
def test_rule_is_found_by_class_names(optimizer, dataset, base_lr):
    name, rule = find_rule(optimizer, dataset)
    assert name == ('ADE20K' if 'ADE20K' in dataset else 'COCO')
    assert rule.base_lr == base_lr


def test_no_rule_where_the_paper_has_none():
    assert find_rule('Lion', 'CocoDataset') == ('COCO', None)
    assert find_rule('AdamW', 'ADE20KDataset') == ('ADE20K', None)
