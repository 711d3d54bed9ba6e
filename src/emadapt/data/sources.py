"""Public datasets: where to get them, and under which terms.

The sha256 are those that another project's loaders publish for these archives. Nothing here was
checked against a download: neither the archives nor the datasets to be downloaded by hand.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emadapt.errors import InputError

SOURCE = "SOURCE.json"
"""Where a dataset is from and its licence, in the dataset's folder; `emadapt fetch` writes it."""


@dataclass(frozen=True)
class Archive:
    """A zip archive to download."""

    urls: tuple[str, ...]  # of the same bytes, mirrors last
    sha256: str
    root: str  # the folder in the archive that has the layout
    folders: tuple[str, ...]  # of slices, below the root; nothing else is taken


@dataclass(frozen=True)
class Dataset:
    """A public dataset."""

    name: str  # of its folder below data/
    layout: str  # a key of `layouts.LAYOUTS`
    voxel_nm: tuple[float, float, float]  # (z, y, x)
    foreground: str  # rule for labels, as in params.yaml
    licence: str
    citation: str
    doi: str  # of the citation
    note: str  # what it shows
    archive: Archive | None = None  # to download; None: by hand
    by_hand: str = ""  # which files of which page to put where, below the dataset's folder

    @property
    def settings(self) -> str:
        """For `datasets` of params.yaml."""
        voxel = ", ".join(f"{size:g}" for size in self.voxel_nm)
        return f'{{layout: {self.layout}, voxel_nm: [{voxel}], foreground: "{self.foreground}"}}'


_XIE = (
    "Xie et al., Transfer learning improves performance in volumetric electron microscopy organelle"
    " segmentation across tissues, Bioinformatics Advances 5 (2025), doi 10.1093/bioadv/vbaf021."
)

DATASETS = {
    "lucchi": Dataset(
        name="lucchi",
        layout="lucchi",
        voxel_nm=(5.0, 5.0, 5.0),
        foreground=">127",
        licence="research use; cite both papers",
        citation="Lucchi et al., Supervoxel-based segmentation of mitochondria in EM image stacks"
        " with learned shape features, IEEE Transactions on Medical Imaging 31 (2012). Labels:"
        " Casser et al., Fast mitochondria detection for connectomics, MIDL 2020.",
        doi="10.1109/TMI.2011.2171705",
        note="EPFL CA1 hippocampus, FIB-SEM, with the corrected labels called Lucchi++; official"
        " train and test halves.",
        archive=Archive(
            urls=(
                "http://www.casser.io/files/lucchi_pp.zip",
                # A copy by PyTorch Connectomics; used only if it is the same to the byte.
                "https://huggingface.co/datasets/pytc/tutorial/resolve/main/Lucchi%2B%2B.zip",
            ),
            sha256="770ce9e98fc6f29c1b1a250c637e6c5125f2b5f1260e5a7687b55a79e2e8844d",
            root="Lucchi++",
            folders=("Train_In", "Train_Out", "Test_In", "Test_Out"),
        ),
    ),
    "vnc": Dataset(
        name="vnc",
        layout="vnc",
        voxel_nm=(50.0, 4.6, 4.6),
        foreground=">127",  # the masks are anti-aliased
        licence="CC BY-NC-SA 3.0",
        citation="Gerhard, Funke, Martel, Cardona, Fetter, Segmented anisotropic ssTEM dataset of"
        " neural tissue, figshare (2013), doi 10.6084/m9.figshare.856713.",
        doi="10.6084/m9.figshare.856713",
        note="Drosophila larva ventral nerve cord, serial-section TEM, the annotated stack 1; 20"
        " sections, no official split.",
        archive=Archive(
            urls=(
                "https://github.com/unidesigner/groundtruth-drosophila-vnc"
                "/archive/refs/heads/master.zip",
            ),
            sha256="f7bd0db03c86b64440a16b60360ad60c0a4411f89e2c021c7ee2c8d6af3d7e86",
            root="groundtruth-drosophila-vnc-master/stack1",
            folders=("raw", "mitochondria"),
        ),
    ),
    "snemi3d": Dataset(
        name="snemi3d",
        layout="stack",
        voxel_nm=(30.0, 6.0, 6.0),
        foreground=">0",  # every neurite has an id of its own
        licence="ODC-By 1.0 for the volume that it is cut from; see the page",
        citation="Kasthuri et al., Saturated reconstruction of a volume of neocortex, Cell 162"
        " (2015).",
        doi="10.1016/j.cell.2015.06.054",
        note="Neurites in mouse neocortex, ATUM-SEM, 100 sections of 1024 x 1024; 0 is between"
        " them.",
        by_hand="of https://zenodo.org/records/7142003 or https://snemi3d.grand-challenge.org the"
        " training volume train-input.tif as image.tif, its labels train-labels.tif as label.tif",
    ),
    "urocell": Dataset(
        name="urocell",
        layout="stack",
        voxel_nm=(15.0, 16.0, 16.0),
        foreground=">0",
        licence="as its repository says; not checked here",
        citation="Zerovnik Mekuc et al., Automatic segmentation of mitochondria and endolysosomes"
        " in volumetric electron microscopy data, Computers in Biology and Medicine 119 (2020), doi"
        " 10.1016/j.compbiomed.2020.103693.",
        doi="10.1016/j.compbiomed.2020.103693",
        note="Mitochondria in mouse urothelial cells, FIB-SEM, volumes of 256 x 256 x 256.",
        by_hand="of https://github.com/MancaZerovnikMekuc/UroCell a volume of data/ (e.g."
        " fib1-0-0-0.nii.gz) as train/image.nii.gz, the file of this name in mito/binary/ as"
        " train/label.nii.gz, and another such pair in test/",
    ),
    "liver_mouse": Dataset(
        name="liver_mouse",
        layout="folders",
        voxel_nm=(8.0, 8.0, 8.0),
        foreground=">127",  # masks of 0 and 255, one organelle each
        licence="as its EMPIAR entry says; not checked here",
        citation="Parlakgul et al., Regulation of liver subcellular architecture controls"
        f" metabolic homeostasis, Nature 603 (2022). Used by {_XIE}",
        doi="10.1038/s41586-022-04488-5",
        note="Mitochondria, ER and lipid droplets of mouse hepatocytes, FIB-SEM; the whole entry"
        " has terabytes: take a part.",
        by_hand="of https://www.ebi.ac.uk/empiar/EMPIAR-10791/ slices of one FIB-SEM liver in"
        " images/ and the slices of the same numbers of one segmentation in labels/; a dataset for"
        " each organelle",
    ),
    "liver_rat": Dataset(
        name="liver_rat",
        layout="stack",
        voxel_nm=(50.0, 8.0, 8.0),
        foreground=">0",
        licence="as its Zenodo record says; not checked here",
        citation=_XIE,
        doi="10.1093/bioadv/vbaf021",
        note="Mitochondria and ER of rat liver, SBF-SEM, 219 sections of 7000 x 7000; not seen"
        " here: check the labels' values.",
        by_hand="of Zenodo record 13357732, which"
        " https://github.com/Xrioen/cross-tissue-transfer-learning-in-VEM names, the raw volume as"
        " image.tif (or .h5, .zarr, .nii) and the annotation of mitochondria or ER as label.tif",
    ),
}

SYNTHETIC = {
    "name": "synthetic",
    "licence": "Apache-2.0, made by emadapt",
    "citation": "emadapt, layout synthetic",
}
"""What a dataset's SOURCE.json would say."""


def source_of(root: Path) -> dict[str, Any]:
    """What a dataset's `SOURCE.json` says; empty without one."""
    path = root / SOURCE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        found, expected = f"no JSON object ({error})", "what `emadapt fetch` writes"
        do = "Fetch the dataset again, or remove the file."
        raise InputError(path, found=found, expected=expected, do=do) from error
